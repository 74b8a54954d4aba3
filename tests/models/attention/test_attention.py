"""Every attention backend against dense attention in float64, over paged rows of all shapes.

Tolerances: 1e-5 in float32, 5e-3 in float16, 3e-2 in bfloat16 (values of order 1). Every slot that
no row owns is poisoned with NaN, so a backend that reads one cannot pass. A backend of a GPU runs
on a CPU with kernels that check their arguments and compute densely (support/fake_kernels.py), and
on a GPU with its own.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.attention_cases import (
    HEAD_DIM,
    SCALE,
    SUBJECTS,
    Case,
    Subject,
    attend,
    dense,
    make_case,
)

from vlmserve.models.attention import PagedRows

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}

pytestmark = pytest.mark.parametrize("subject", SUBJECTS)


TILE = 5
CAUSAL = {
    "one decode": [(1, 9)],
    "decodes of one length": [(1, 8)] * 5,
    "decodes of many lengths": [(1, 1), (1, 7), (1, 130), (1, 300), (1, 4)],
    "decodes over many blocks": [(1, 900), (1, 256), (1, 257)],
    "whole prompts": [(7, 7), (7, 7), (12, 12)],
    "chunks behind a past": [(5, 9), (5, 30), (3, 4), (5, 5)],
    "chunks over many blocks": [(3, 513), (300, 300), (20, 260)],
    "decodes, chunks and prompts": [(1, 20), (6, 6), (1, 3), (4, 17), (6, 6), (2, 50), (1, 20)],
}
CROSS = {
    "one token": [(1, 5)],
    "all see the same number of tiles": [(1, 10), (1, 10), (1, 10)],
    "any number of tiles": [(1, 5), (1, 20), (4, 10), (3, 5), (4, 20)],
    "some see nothing": [(3, 0), (2, 5), (1, 0), (1, 5), (5, 0)],
    "all see nothing": [(3, 0), (1, 0)],
}


def make(subject: Subject, lens: list[tuple[int, int]], is_causal: bool, **kwargs) -> Case:
    """Rows of (query_len, key_len) in blocks of a size that the backend reads."""
    size = max(4, subject.block_multiple) if is_causal else TILE
    return make_case(lens, is_causal=is_causal, block_size=size, **kwargs)


def check(subject: Subject, case: Case) -> None:
    tolerance = TOLERANCE[case.query.dtype]
    output = attend(subject, case)
    assert output.shape == case.query.shape
    assert output.dtype == case.query.dtype
    torch.testing.assert_close(output.double(), dense(case, SCALE), atol=tolerance, rtol=0.0)


@pytest.mark.parametrize("lens", CAUSAL.values(), ids=CAUSAL)
def test_causal_rows_equal_dense_attention(subject: Subject, lens: list[tuple[int, int]]) -> None:
    for dtype in subject.dtypes:
        check(subject, make(subject, lens, True, dtype=dtype))


@pytest.mark.parametrize("lens", CROSS.values(), ids=CROSS)
def test_cross_rows_equal_dense_attention(subject: Subject, lens: list[tuple[int, int]]) -> None:
    for dtype in subject.dtypes:
        check(subject, make(subject, lens, False, dtype=dtype))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("num_kv_heads", "group"),
    [(1, 1), (1, 4), (4, 1), (2, 4), pytest.param(8, 3, marks=pytest.mark.slow)],
)
def test_every_ratio_of_query_to_kv_heads(
    subject: Subject, num_kv_heads: int, group: int, is_causal: bool
) -> None:
    lens = CAUSAL["decodes, chunks and prompts"] if is_causal else CROSS["any number of tiles"]
    heads = {"num_kv_heads": num_kv_heads, "group": group}
    check(subject, make(subject, lens, is_causal, dtype=subject.dtypes[0], **heads))


@pytest.mark.parametrize("seed", range(20))
def test_random_batches_equal_dense_attention(subject: Subject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    is_causal, lens = bool(seed % 2), []
    for _ in range(rng.integers(1, 12)):
        query_len = int(rng.choice([1, 1, 2, 5, 40]))
        past = int(rng.choice([0, 0, 3, 60, 200]))
        num_tiles = int(rng.choice([0, 0, 1, 4, 8]))
        lens.append((query_len, query_len + past if is_causal else num_tiles * TILE))
    check(subject, make(subject, lens, is_causal, dtype=subject.dtypes[0], seed=seed))


def test_rows_that_share_images_equal_dense_attention(subject: Subject) -> None:
    """The same picture in two requests, and one tile of it again in a third."""
    case = make(subject, [(2, 10), (1, 10), (3, 5), (1, 15)], False, dtype=subject.dtypes[0])
    table = case.rows.block_table
    table[1, :2] = table[0, :2]
    table[2, 0] = table[0, 1]
    for own in (case.keys, case.values):
        own[1], own[2] = own[0], own[0][TILE:]
    check(subject, case)


@pytest.mark.parametrize("is_causal", [True, False])
def test_many_decodes_in_bfloat16_equal_dense_attention(subject: Subject, is_causal: bool) -> None:
    """On a CPU the reference backend takes its wide products for these."""
    lens = [(1, 60 + row if is_causal else 60 + 5 * row) for row in range(24)]
    check(subject, make(subject, lens, is_causal, dtype=torch.bfloat16))


def test_a_row_without_keys_gives_zeros(subject: Subject) -> None:
    output = attend(subject, make(subject, [(2, 0), (3, 5)], False, dtype=subject.dtypes[0]))
    assert (output[:2] == 0).all()
    assert (output[2:] != 0).any()


def test_a_row_is_the_same_whatever_is_beside_it(subject: Subject) -> None:
    dtype = subject.dtypes[0]
    case = make(subject, [(3, 11), (1, 200), (5, 5)], True, dtype=dtype)
    together = attend(subject, case)
    size, table = case.rows.block_size, case.rows.block_table[:1]
    case.rows = PagedRows(np.array([0, 3]), np.array([11]), table, size, True)
    case.query = case.query[:3]
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(attend(subject, case), together[:3], atol=tolerance, rtol=0.0)


def test_write_stores_in_the_slots_and_nowhere_else(subject: Subject) -> None:
    device = subject.device
    keys, values = torch.randn(2, 3, 2, HEAD_DIM, device=device).unbind()
    key_cache, value_cache = torch.zeros(2, 4, 4, 2, HEAD_DIM, device=device).unbind()
    slots = torch.tensor([9, 0, 15], device=device)
    subject.make().write(keys, values, key_cache, value_cache, slots)
    for cache, fresh in ((key_cache, keys), (value_cache, values)):
        torch.testing.assert_close(cache.view(16, 2, HEAD_DIM)[slots], fresh)
        assert cache.abs().sum().item() == pytest.approx(fresh.abs().sum().item())
