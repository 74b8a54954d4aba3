"""Pieces of keys: complete, no more than their room, and of like size whatever the rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlmserve.models.attention import Geometry, PagedRows
from vlmserve.models.attention.triton_paged import TritonBackend
from vlmserve.models.attention.work_items import (
    KEYS_AT_ONCE,
    MIN_PIECE,
    NO_ITEM,
    NUM_PROGRAMS,
    WorkLayout,
    cut,
    num_extra_items,
    write,
)

# KV heads of a rank of the 11B and 90B: alone, and over 2, 4 and 8 ranks
KV_HEADS = (8, 4, 2, 1)
IMAGE = 4 * 1_601
STEPS = {
    "one long row among 32": [32_768] + [500] * 31,
    "one long row among 32 that have just begun": [32_768] + [10] * 31,
    "a row of 131k alone": [131_072],
    "a row of 131k among 64": [131_072] + [256] * 63,
    "64 equal rows": [5_000] * 64,
    "17 rows, where the keys were no longer cut": [8_000] * 17,
    "images beside text": [IMAGE] * 3 + [0] * 29,
    "one image": [IMAGE],
    "images of all sizes": [1_601 * (row % 5) for row in range(48)],
}


def keys_of_items(num_keys: np.ndarray, num_kv_heads: int) -> np.ndarray:
    """The keys of each item, as a kernel reads the lists."""
    pieces = cut(num_keys, num_extra_items(len(num_keys), num_kv_heads))
    first = pieces.pieces * pieces.size
    return np.minimum(first + pieces.size, num_keys[pieces.tiles]) - first


@pytest.mark.parametrize("num_kv_heads", KV_HEADS)
@pytest.mark.parametrize("lens", STEPS.values(), ids=STEPS)
def test_no_program_has_many_more_keys_than_another(lens: list[int], num_kv_heads: int) -> None:
    """From 17 rows on a row was one program a head: 32k keys, and the others waited."""
    num_keys = np.array(lens)
    keys = keys_of_items(num_keys, num_kv_heads)
    assert keys.sum() == num_keys.sum()
    share = num_keys.sum() * num_kv_heads / NUM_PROGRAMS
    assert keys.max() <= max(MIN_PIECE, share + KEYS_AT_ONCE)
    # programs that have keys at all
    assert keys.max() <= max(MIN_PIECE, 2.1 * keys[keys > 0].mean())


@pytest.mark.parametrize("num_kv_heads", KV_HEADS)
def test_a_few_long_rows_fill_a_gpu(num_kv_heads: int) -> None:
    for lens in ([131_072], [40_000] * 4):
        keys = keys_of_items(np.array(lens), num_kv_heads)
        assert len(keys) * num_kv_heads >= 0.95 * NUM_PROGRAMS


def test_short_rows_are_not_cut() -> None:
    pieces = cut(np.array([100, 0, 128, 1]), num_extra=32)
    assert pieces.tiles.tolist() == [2, 0, 3, 1]
    assert not pieces.split.size


@pytest.mark.parametrize("seed", range(5))
def test_items_are_complete_and_fit_the_room_of_any_recorded_step(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(60):
        num_rows = int(rng.integers(1, 300))
        num_keys = rng.integers(0, 10 ** rng.integers(1, 6), num_rows)
        for num_extra in (0, 1, 7, num_extra_items(num_rows, 8)):
            pieces = cut(num_keys, num_extra)
            assert len(pieces.tiles) <= num_rows + num_extra
            counts = np.bincount(pieces.tiles, minlength=num_rows)
            assert (counts == np.maximum(1, -(-num_keys // pieces.size))).all()
            firsts = np.flatnonzero(pieces.pieces == 0)
            assert len(firsts) == num_rows
            cut_tiles = pieces.tiles[pieces.split]
            assert sorted(cut_tiles) == np.flatnonzero(counts > 1).tolist()
            # the items of a tile are consecutive, as the merge reads them
            for first, tile in zip(firsts, pieces.tiles[firsts], strict=True):
                last = first + counts[tile]
                assert (pieces.tiles[first:last] == tile).all()
                assert (pieces.pieces[first:last] == np.arange(counts[tile])).all()


def test_the_lists_of_a_recorded_step_are_padded() -> None:
    layout = WorkLayout(num_rows=3, num_items=8)
    buffer = np.full(layout.num_entries, 77, dtype=np.int32)
    work = layout.views(buffer)
    write(work, cut(np.array([300, 0, 20]), layout.num_extra), table_stride=9)
    assert work.rows.tolist() == [0, 0, 0, 2, 1] + [NO_ITEM] * 3
    assert work.pieces.tolist() == [0, 1, 2, 0, 0] + [NO_ITEM] * 3
    assert work.split.tolist() == [0, NO_ITEM, NO_ITEM]
    assert work.sizes.tolist() == [128, 9]


@pytest.mark.parametrize(
    ("num_rows", "longest", "num_items"),
    [(1, 131_072, 33), (64, 131_072, 128), (4, 200, 8), (24, 100, 24), (256, 8_192, 512)],
)
def test_a_recorded_step_has_room_for_what_fills_a_gpu_and_no_more_than_its_rows_can_have(
    num_rows: int, longest: int, num_items: int
) -> None:
    assert TritonBackend().work_layout(num_rows, longest) == WorkLayout(num_rows, num_items)


@pytest.mark.parametrize(("num_kv_heads", "num_items"), [(8, 33), (2, 129), (1, 257)])
def test_a_rank_with_few_heads_cuts_its_keys_into_more_pieces(
    num_kv_heads: int, num_items: int
) -> None:
    geometry = Geometry(torch.device("cpu"), torch.bfloat16, 4, num_kv_heads, 128, 1_601)
    backend = TritonBackend().sized_for(geometry)
    assert backend.work_layout(1, 131_072) == WorkLayout(1, num_items)
    rows = PagedRows(np.array([0, 1]), np.array([131_072]), np.zeros((1, 8_192), int), 16, True)
    (launch,) = backend.prepare(rows, geometry.device, geometry.dtype).launches
    assert num_items - 2 <= len(launch.items.rows) < num_items
