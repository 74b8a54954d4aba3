"""Every attention backend against dense attention in float64, over paged rows of all shapes.

Tolerances: 1e-5 in float32, 3e-2 in bfloat16 (values of order 1). Every slot that no row owns is
poisoned with NaN, so a backend that reads one cannot pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from vlmserve.models.attention import PagedRows, backend_names, get_backend, sdpa
from vlmserve.models.errors import ModelError

CPU = torch.device("cpu")
HEAD_DIM = 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}

pytestmark = pytest.mark.parametrize("backend_name", backend_names())


@dataclass
class Case:
    """Rows over one layer's pool, and what each row's keys and values are, unpaged."""

    rows: PagedRows
    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    keys: list[Tensor]
    values: list[Tensor]


def make_case(
    lens: list[tuple[int, int]],
    *,
    is_causal: bool,
    block_size: int = 4,
    num_kv_heads: int = 2,
    group: int = 3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Rows of (query_len, key_len) in blocks of random places; every other slot is NaN."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    counts = [-(-key_len // block_size) for _, key_len in lens]
    num_blocks = sum(counts) + 3
    places = rng.permutation(num_blocks).tolist()
    table = np.zeros((len(lens), max(1, *counts)), dtype=np.int64)
    shape = (num_blocks, block_size, num_kv_heads, HEAD_DIM)
    caches = [torch.full(shape, float("nan"), dtype=dtype) for _ in range(2)]
    own: tuple[list[Tensor], list[Tensor]] = ([], [])
    for row, ((_, key_len), count) in enumerate(zip(lens, counts, strict=True)):
        blocks = [places.pop() for _ in range(count)]
        table[row, :count] = blocks
        slots = [blocks[j // block_size] * block_size + j % block_size for j in range(key_len)]
        for cache, unpaged in zip(caches, own, strict=True):
            fresh = torch.randn(key_len, num_kv_heads, HEAD_DIM, generator=generator).to(dtype)
            cache.view(-1, num_kv_heads, HEAD_DIM)[slots] = fresh
            unpaged.append(fresh)
    starts = np.concatenate([[0], np.cumsum([q for q, _ in lens])]).astype(np.int64)
    key_lens = np.array([k for _, k in lens], dtype=np.int64)
    rows = PagedRows(starts, key_lens, table, block_size, is_causal)
    num_heads = num_kv_heads * group
    query = torch.randn(rows.num_queries, num_heads, HEAD_DIM, generator=generator).to(dtype)
    return Case(rows, query, caches[0], caches[1], own[0], own[1])


def dense(case: Case, scale: float) -> Tensor:
    """Softmax attention row by row and head by head in float64; zeros where a row has no key."""
    output = torch.zeros(case.query.shape, dtype=torch.float64)
    starts, num_heads = case.rows.query_start_loc.tolist(), case.query.shape[1]
    for row, (keys, values) in enumerate(zip(case.keys, case.values, strict=True)):
        query_len, key_len = starts[row + 1] - starts[row], len(keys)
        if key_len == 0:
            continue
        for head in range(num_heads):
            kv_head = head // (num_heads // keys.shape[1])
            query = case.query[starts[row] : starts[row + 1], head].double()
            scores = query @ keys[:, kv_head].double().T * scale
            if case.rows.is_causal:
                unseen = torch.ones(query_len, key_len).triu(key_len - query_len + 1).bool()
                scores = scores.masked_fill(unseen, float("-inf"))
            mixed = scores.softmax(-1) @ values[:, kv_head].double()
            output[starts[row] : starts[row + 1], head] = mixed
    return output


def attend(backend_name: str, case: Case) -> Tensor:
    backend = get_backend(backend_name)
    plan = backend.prepare(case.rows, CPU, case.query.dtype)
    return backend.attend(case.query, case.key_cache, case.value_cache, plan, 0.25)


def check(backend_name: str, case: Case) -> None:
    tolerance = TOLERANCE[case.query.dtype]
    output = attend(backend_name, case)
    assert output.shape == case.query.shape
    assert output.dtype == case.query.dtype
    torch.testing.assert_close(output.double(), dense(case, 0.25), atol=tolerance, rtol=0.0)


CAUSAL = {
    "one decode": [(1, 9)],
    "decodes of one length": [(1, 8)] * 5,
    "decodes of many lengths": [(1, 1), (1, 7), (1, 130), (1, 300), (1, 4)],
    "whole prompts": [(7, 7), (7, 7), (12, 12)],
    "chunks behind a past": [(5, 9), (5, 30), (3, 4), (5, 5)],
    "decodes, chunks and prompts": [(1, 20), (6, 6), (1, 3), (4, 17), (6, 6), (2, 50), (1, 20)],
}
CROSS = {
    "one token": [(1, 5)],
    "all see the same number of tiles": [(1, 10), (1, 10), (1, 10)],
    "any number of tiles": [(1, 5), (1, 20), (4, 10), (3, 5), (4, 20)],
    "some see nothing": [(3, 0), (2, 5), (1, 0), (1, 5), (5, 0)],
    "all see nothing": [(3, 0), (1, 0)],
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lens", CAUSAL.values(), ids=CAUSAL)
def test_causal_rows_equal_dense_attention(
    backend_name: str, lens: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    check(backend_name, make_case(lens, is_causal=True, dtype=dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lens", CROSS.values(), ids=CROSS)
def test_cross_rows_equal_dense_attention(
    backend_name: str, lens: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    check(backend_name, make_case(lens, is_causal=False, block_size=5, dtype=dtype))


@pytest.mark.parametrize(("num_kv_heads", "group"), [(1, 1), (1, 4), (4, 1), (2, 4), (8, 3)])
def test_every_ratio_of_query_to_kv_heads(backend_name: str, num_kv_heads: int, group: int) -> None:
    lens = CAUSAL["decodes, chunks and prompts"]
    check(backend_name, make_case(lens, is_causal=True, num_kv_heads=num_kv_heads, group=group))


@pytest.mark.parametrize("seed", range(20))
def test_random_batches_equal_dense_attention(backend_name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    is_causal, lens = bool(seed % 2), []
    for _ in range(rng.integers(1, 12)):
        query_len = int(rng.choice([1, 1, 2, 5, 40]))
        past = int(rng.choice([0, 0, 3, 60, 200]))
        lens.append((query_len, query_len + past if is_causal else past))
    check(backend_name, make_case(lens, is_causal=is_causal, seed=seed))


@pytest.mark.parametrize("is_causal", [True, False])
def test_many_decodes_in_bfloat16_take_the_wide_products(
    backend_name: str, is_causal: bool
) -> None:
    lens = [(1, 60 + row) for row in range(24)]
    check(backend_name, make_case(lens, is_causal=is_causal, dtype=torch.bfloat16))


def test_long_chunks_are_cut_and_large_groups_split(
    backend_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend_name != "sdpa":
        pytest.skip("the limits are the reference backend's")
    monkeypatch.setattr(sdpa, "MAX_MASKED_QUERIES", 4)
    monkeypatch.setattr(sdpa, "MAX_BUCKET_KEYS", 16)
    case = make_case([(11, 30), (4, 9), (1, 12), (1, 12), (1, 12)], is_causal=True)
    plan = get_backend(backend_name).prepare(case.rows, CPU, torch.float32)
    assert max(bucket.query_len for bucket in plan) == 4
    assert max(bucket.num_rows for bucket in plan) == 1
    check(backend_name, case)


def test_a_row_without_keys_gives_zeros(backend_name: str) -> None:
    output = attend(backend_name, make_case([(2, 0), (3, 5)], is_causal=False, block_size=5))
    assert (output[:2] == 0).all()
    assert (output[2:] != 0).any()


def test_a_row_is_the_same_whatever_is_beside_it(backend_name: str) -> None:
    case = make_case([(3, 11), (1, 200), (5, 5)], is_causal=True)
    together = attend(backend_name, case)
    rows = PagedRows(np.array([0, 3]), np.array([11]), case.rows.block_table[:1], 4, True)
    case.rows, case.query = rows, case.query[:3]
    torch.testing.assert_close(attend(backend_name, case), together[:3], atol=1e-6, rtol=0.0)


def test_write_stores_in_the_slots_and_nowhere_else(backend_name: str) -> None:
    keys, values = torch.randn(3, 2, HEAD_DIM), torch.randn(3, 2, HEAD_DIM)
    key_cache, value_cache = torch.zeros(4, 4, 2, HEAD_DIM), torch.zeros(4, 4, 2, HEAD_DIM)
    slots = torch.tensor([9, 0, 15])
    get_backend(backend_name).write(keys, values, key_cache, value_cache, slots)
    for cache, fresh in ((key_cache, keys), (value_cache, values)):
        torch.testing.assert_close(cache.view(16, 2, HEAD_DIM)[slots], fresh)
        assert cache.abs().sum().item() == pytest.approx(fresh.abs().sum().item())


def test_an_unknown_backend_is_refused_by_name(backend_name: str) -> None:
    with pytest.raises(ModelError, match=f"'paper' is unknown.*{backend_name}"):
        get_backend("paper")
