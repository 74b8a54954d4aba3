"""The reference backend: gathers paged keys and calls torch's SDPA. Runs on any device.

Groups a step's rows into few dense calls. Rows with equally many queries and similarly many keys
share a bucket: one gather of keys, padded to the longest row, and one attention call. Padding
repeats the row's first key and is masked, so no slot of another row is read, not even a NaN.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..device_copies import upload
from ..kernels.float32_products import is_bfloat16_slow
from .base import AttentionBackend, PagedRows
from .int8_states import States, gather_states

# most keys that a bucket gathers: 128 MiB of keys of Llama-3.2-11B in bf16
MAX_BUCKET_KEYS = 65_536
# a longer chunk behind a past is cut, to limit its mask
MAX_MASKED_QUERIES = 512
# shorter rows share a bucket: a call costs more than their padding
MIN_BUCKET_LEN = 128


@dataclass(slots=True, frozen=True)
class Bucket:
    """Rows of one dense call: num_rows x query_len queries over num_rows x key_len keys.

    queries: int64 [num_rows * query_len], positions in the packed queries; None for all queries in
    order. slots: int64 [num_rows * key_len]. mask: added to the scores, [num_rows, 1, query_len or
    1, key_len]; None if every key is seen or `is_causal` is set.
    """

    num_rows: int
    query_len: int
    key_len: int
    queries: Tensor | None
    slots: Tensor
    mask: Tensor | None
    is_causal: bool


@dataclass(slots=True, frozen=True)
class _Row:
    """A row, or a part of one: queries start : start + query_len over its first key_len keys."""

    index: int
    start: int
    query_len: int
    key_len: int


class SdpaBackend(AttentionBackend):
    """Attention by gathering keys and `scaled_dot_product_attention`."""

    name: ClassVar[str] = "sdpa"

    def prepare(self, rows: PagedRows, device: torch.device, dtype: torch.dtype) -> list[Bucket]:
        """The buckets of these rows; see `AttentionBackend.prepare`."""
        groups: dict[tuple[int, int], list[_Row]] = defaultdict(list)
        for row in _split(rows):
            groups[row.query_len, _length_class(row.key_len)].append(row)
        return [
            _bucket(rows, part, device, dtype)
            for group in groups.values()
            for part in _bounded(group)
        ]

    def attend(
        self,
        query: Tensor,
        key_cache: States,
        value_cache: States,
        plan: list[Bucket],
        scale: float,
    ) -> Tensor:
        """The attention output, bucket by bucket; see `AttentionBackend.attend`."""
        if len(plan) == 1 and plan[0].queries is None:
            return _attend_bucket(query, key_cache, value_cache, plan[0], scale)
        output = torch.zeros_like(query, memory_format=torch.contiguous_format)
        for bucket in plan:
            assert bucket.queries is not None, "a bucket of all queries is the only bucket"
            queries = query.index_select(0, bucket.queries)
            part = _attend_bucket(queries, key_cache, value_cache, bucket, scale)
            output.index_copy_(0, bucket.queries, part)
        return output


def _split(rows: PagedRows) -> list[_Row]:
    """The rows that see anything, long masked ones cut into parts."""
    parts: list[_Row] = []
    starts, lens = rows.query_start_loc.tolist(), rows.key_lens.tolist()
    for index, key_len in enumerate(lens):
        start, query_len = starts[index], starts[index + 1] - starts[index]
        if key_len == 0 or query_len == 0:
            continue
        if rows.is_causal and MAX_MASKED_QUERIES < query_len < key_len:
            parts += _cut(_Row(index, start, query_len, key_len))
        else:
            parts.append(_Row(index, start, query_len, key_len))
    return parts


def _cut(row: _Row) -> list[_Row]:
    """A causal row in parts of MAX_MASKED_QUERIES, each over only the keys it may see."""
    parts = []
    for offset in range(0, row.query_len, MAX_MASKED_QUERIES):
        size = min(MAX_MASKED_QUERIES, row.query_len - offset)
        key_len = row.key_len - row.query_len + offset + size
        parts.append(_Row(row.index, row.start + offset, size, key_len))
    return parts


def _length_class(key_len: int) -> int:
    """A class of lengths that differ by at most a factor of two; short rows share one."""
    return max(key_len - 1, MIN_BUCKET_LEN - 1).bit_length()


def _bounded(group: list[_Row]) -> list[list[_Row]]:
    """The group in pieces of at most MAX_BUCKET_KEYS padded keys, one row at least."""
    longest = max(row.key_len for row in group)
    size = max(1, MAX_BUCKET_KEYS // longest)
    return [group[i : i + size] for i in range(0, len(group), size)]


def _bucket(rows: PagedRows, group: list[_Row], device: torch.device, dtype: torch.dtype) -> Bucket:
    query_len, key_lens = group[0].query_len, np.array([row.key_len for row in group])
    key_len = int(key_lens.max())
    starts = np.array([row.start for row in group])
    queries = (starts[:, None] + np.arange(query_len)).reshape(-1)
    is_everything = len(queries) == rows.num_queries and bool((np.diff(queries) == 1).all())
    # SDPA's causal flag is aligned to the top left: correct only without a past
    is_causal = rows.is_causal and query_len > 1 and bool((key_lens == query_len).all())
    mask = None if is_causal else _mask(rows, query_len, key_lens)
    slots = _slots(rows, [row.index for row in group], key_lens)
    return Bucket(
        num_rows=len(group),
        query_len=query_len,
        key_len=key_len,
        queries=None if is_everything else upload(queries, device),
        slots=upload(slots, device),
        mask=None if mask is None else _additive(mask, device, dtype),
        is_causal=is_causal,
    )


def _slots(rows: PagedRows, indices: list[int], key_lens: NDArray[np.int64]) -> NDArray[np.int64]:
    """The slot of every key of these rows, [num_rows * longest]; padding repeats the first key."""
    longest, size = int(key_lens.max()), rows.block_size
    blocks = rows.block_table[indices, : -(-longest // size)]
    slots = (blocks[:, :, None] * size + np.arange(size)).reshape(len(indices), -1)[:, :longest]
    is_key = np.arange(longest) < key_lens[:, None]
    return np.where(is_key, slots, slots[:, :1]).reshape(-1)


def _mask(rows: PagedRows, query_len: int, key_lens: NDArray[np.int64]) -> NDArray[np.bool_] | None:
    """Which keys may be seen, [num_rows, 1, query_len or 1, longest]; None if all are."""
    longest = int(key_lens.max())
    last_seen = key_lens[:, None, None] - 1
    if rows.is_causal and query_len > 1:
        last_seen = last_seen - np.arange(query_len - 1, -1, -1)[:, None]
    elif (key_lens == longest).all():
        return None
    return (np.arange(longest) <= last_seen)[:, None]


def _additive(mask: NDArray[np.bool_], device: torch.device, dtype: torch.dtype) -> Tensor:
    """0 where a key may be seen, -inf elsewhere."""
    is_seen = upload(mask, device)
    return torch.zeros(is_seen.shape, dtype=dtype, device=device).masked_fill_(
        ~is_seen, float("-inf")
    )


def _attend_bucket(
    query: Tensor, key_cache: States, value_cache: States, bucket: Bucket, scale: float
) -> Tensor:
    """One dense call, [num_rows * query_len, num_heads, head_dim] to the same."""
    num_kv_heads, head_dim = key_cache.shape[-2:]
    shape = (bucket.num_rows, bucket.key_len, num_kv_heads, head_dim)
    keys, values = (
        gather_states(cache, bucket.slots).view(shape) for cache in (key_cache, value_cache)
    )
    # [num_rows, query_len, num_kv_heads, group, head_dim]
    grouped = query.reshape(bucket.num_rows, bucket.query_len, num_kv_heads, -1, head_dim)
    if bucket.query_len > 1 and (bucket.mask is not None or bucket.is_causal):
        output = _attend_by_member(grouped, keys, values, bucket, scale)
    elif _prefers_wide_products(query, bucket):
        output = _attend_wide(grouped, keys, values, bucket, scale)
    else:
        output = _attend_folded(grouped, keys, values, bucket, scale)
    return output.reshape(query.shape)


def _attend_by_member(
    grouped: Tensor, keys: Tensor, values: Tensor, bucket: Bucket, scale: float
) -> Tensor:
    """One call for each member of the KV groups, so that keys and mask are not copied."""
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    members = [
        F.scaled_dot_product_attention(
            member.transpose(1, 2),
            keys,
            values,
            attn_mask=bucket.mask,
            is_causal=bucket.is_causal,
            scale=scale,
        ).transpose(1, 2)
        for member in grouped.unbind(3)
    ]
    return torch.stack(members, dim=3)


def _attend_folded(
    grouped: Tensor, keys: Tensor, values: Tensor, bucket: Bucket, scale: float
) -> Tensor:
    """One call with the query heads of a KV group as query rows; the mask is the same for all."""
    num_rows, query_len, num_kv_heads, group, head_dim = grouped.shape
    folded = grouped.transpose(1, 2).reshape(num_rows, num_kv_heads, query_len * group, head_dim)
    output = F.scaled_dot_product_attention(
        folded, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=bucket.mask, scale=scale
    )
    return output.view(num_rows, num_kv_heads, query_len, group, head_dim).transpose(1, 2)


def _prefers_wide_products(query: Tensor, bucket: Bucket) -> bool:
    """Whether plain products are faster than SDPA: half precision on a CPU, one query a row.

    Not where products of bfloat16 are slow: there they take 8 to 20 times as long as SDPA, whose
    sums are in float32.
    """
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    num_keys = bucket.num_rows * bucket.key_len
    is_wide = is_half and query.device.type == "cpu" and bucket.query_len == 1 and num_keys >= 1024
    return is_wide and not (query.dtype == torch.bfloat16 and is_bfloat16_slow())


def _attend_wide(
    grouped: Tensor, keys: Tensor, values: Tensor, bucket: Bucket, scale: float
) -> Tensor:
    """Attention of one query a row by two products over all KV heads at once.

    Each query head is spread over the width of all KV heads, zero outside its own, so that the
    gathered keys need no copy: [heads, width] x [width, key_len]. Several times the arithmetic of
    SDPA's narrow products, but a third of their time on a CPU in bf16.
    """
    num_rows, _, num_kv_heads, group, head_dim = grouped.shape
    width = num_kv_heads * head_dim
    own = torch.eye(num_kv_heads, dtype=grouped.dtype, device=grouped.device)
    spread = grouped.view(num_rows, num_kv_heads, group, 1, head_dim) * own[:, None, :, None]
    flat = spread.view(num_rows, num_kv_heads * group, width)
    scores = torch.bmm(flat, keys.view(num_rows, -1, width).transpose(1, 2)).float().mul_(scale)
    if bucket.mask is not None:
        scores += bucket.mask[:, 0]
    weights = scores.softmax(-1).to(values.dtype)
    mixed = torch.bmm(weights, values.view(num_rows, -1, width))
    mixed = mixed.view(num_rows, num_kv_heads, group, num_kv_heads, head_dim)
    return mixed.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
