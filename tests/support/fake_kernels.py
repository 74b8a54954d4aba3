"""Stand-ins on a CPU for the kernels of flash-attn 2.8 and of torch 2.13's `varlen_attn`.

Each refuses what the real one refuses and computes the rest densely in float64, so a wrong block
table, length or shape fails here. The facts are the C++ checks of both (`mha_varlen_fwd`,
`mha_fwd_kvcache`): int32, contiguous, blocks in multiples of 256, causal masks aligned to the last
key, and that a call of single queries with grouped heads and no mask is reshaped by sequence, which
a sequence without a query breaks. Not refused: float32, for tight tolerances.
"""

from __future__ import annotations

import torch

from vlmserve.models.attention.flash_attn_package import FlashAttnKernels

BLOCK_MULTIPLE = 256


def _attend(query, keys, values, scale, causal):
    """[n, heads, dim] over [m, kv_heads, dim]: the output, and the log-sum-exp [heads, n]."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (t.double().repeat_interleave(group, dim=1) for t in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * scale
    if causal:
        unseen = torch.ones(scores.shape[1:], dtype=torch.bool)
        scores = scores.masked_fill(unseen.triu(keys.shape[0] - len(query) + 1), float("-inf"))
    output = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return output.to(query.dtype), scores.logsumexp(-1).float()


def _check_index(tensor, shape):
    assert tensor.dtype == torch.int32, "indices are int32"
    assert tensor.is_contiguous()
    assert tuple(tensor.shape) == shape, (tuple(tensor.shape), shape)


def _check_tensors(query, keys, values, ndim):
    assert query.ndim == ndim
    assert keys.shape == values.shape
    assert query.dtype == keys.dtype == values.dtype
    assert query.stride(-1) == keys.stride(-1) == values.stride(-1) == 1
    num_heads, num_kv_heads = query.shape[-2], keys.shape[-2]
    assert num_heads % num_kv_heads == 0
    assert query.shape[-1] == keys.shape[-1]
    assert query.shape[-1] % 8 == 0
    assert query.shape[-1] <= 256


def _check_starts(starts, total, is_whole):
    assert starts[0] == 0
    assert (starts.diff() >= 0).all()
    assert starts[-1] == total if is_whole else starts[-1] <= total


def _paged(cache, table, length):
    """The first `length` entries behind a row of a block table."""
    size = cache.shape[1]
    assert size % BLOCK_MULTIPLE == 0, "Paged KV cache block size must be divisible by 256"
    assert length <= len(table) * size, "the table does not reach that far"
    assert ((table >= 0) & (table < len(cache))).all()
    return cache[table[: -(-length // size)].long()].flatten(0, 1)[:length]


def _varlen(query, keys, values, starts, max_q, max_k, scale, causal, key_of):
    """Sequence by sequence; `key_of(cache, i)` are the keys of sequence i."""
    lens = starts.diff().tolist()
    assert lens, "batch size must be positive"
    assert max_q >= max(lens)
    if max_q == 1 and query.shape[1] > keys.shape[-2] and not causal:
        assert len(query) == len(lens), "single queries are reshaped by sequence"
    output = torch.full_like(query, float("nan"))
    lse = torch.full((query.shape[1], len(query)), float("nan"))
    for index, length in enumerate(lens):
        own = slice(int(starts[index]), int(starts[index + 1]))
        its_keys, its_values = key_of(keys, index), key_of(values, index)
        assert len(its_keys) <= max_k
        if length:
            output[own], lse[:, own] = _attend(query[own], its_keys, its_values, scale, causal)
    return output, lse


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    """The package's function of that name, which gets the lengths of paged keys from the sums."""
    _check_tensors(q, k, v, 3)
    num = len(cu_seqlens_q) - 1
    _check_index(cu_seqlens_q, (num + 1,))
    _check_index(cu_seqlens_k, (num + 1,))
    _check_starts(cu_seqlens_q, len(q), is_whole=True)
    lens = cu_seqlens_k.diff().tolist()
    if block_table is None:
        _check_starts(cu_seqlens_k, len(k), is_whole=False)

        def key_of(cache, i):
            return cache[cu_seqlens_k[i] : cu_seqlens_k[i + 1]]
    else:
        _check_index(block_table, (num, block_table.shape[1]))

        def key_of(cache, i):
            return _paged(cache, block_table[i], lens[i])

    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    output, lse = _varlen(q, k, v, cu_seqlens_q, max_seqlen_q, max_seqlen_k, scale, causal, key_of)
    return (output, lse, None) if return_attn_probs else output


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
):  # fmt: skip
    """The package's function of that name, for paged keys."""
    _check_tensors(q, k_cache, v_cache, 4)
    _check_index(cache_seqlens, (len(q),))
    _check_index(block_table, (len(q), block_table.shape[1]))
    outputs = []
    for row, length in enumerate(cache_seqlens.tolist()):
        keys, values = (_paged(cache, block_table[row], length) for cache in (k_cache, v_cache))
        outputs.append(_attend(q[row], keys, values, softmax_scale, causal)[0])
    return torch.stack(outputs)


FLASH_ATTN = FlashAttnKernels(flash_attn_varlen_func, flash_attn_with_kvcache)


def varlen_attn_of(impl):
    """torch's `varlen_attn` before the implementation "FA2" or a later one."""

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
        window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
    ):  # fmt: skip
        _check_tensors(query, key, value, 3)
        num = len(cu_seq_q) - 1
        _check_index(cu_seq_q, (num + 1,))
        _check_starts(cu_seq_q, len(query), is_whole=True)
        assert enable_gqa or query.shape[1] == key.shape[-2], "set enable_gqa"
        assert window_size in ((-1, -1), (-1, 0))
        if block_table is None:
            _check_index(cu_seq_k, (num + 1,))
            _check_starts(cu_seq_k, len(key), is_whole=False)

            def key_of(cache, i):
                return cache[cu_seq_k[i] : cu_seq_k[i + 1]]
        else:
            _check_index(block_table, (num, block_table.shape[1]))
            _check_index(seqused_k, (num,))
            _check_capacity(cu_seq_k, block_table.shape[1] * key.shape[1], num, impl)

            def key_of(cache, i):
                return _paged(cache, block_table[i], int(seqused_k[i]))

        causal = window_size == (-1, 0)
        output, lse = _varlen(query, key, value, cu_seq_q, max_q, max_k, scale, causal, key_of)
        return (output, lse) if return_aux is not None and return_aux.lse else output

    return varlen_attn


def _check_capacity(cu_seq_k, capacity, num, impl):
    if impl == "FA2":
        assert cu_seq_k.dtype == torch.int32
        assert cu_seq_k.tolist() == [i * capacity for i in range(num + 1)]
    else:
        assert cu_seq_k is None, "If cu_seqlens_k is passed in, then page table is not supported"
