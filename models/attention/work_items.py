"""Cuts the keys of a step's query tiles into pieces, so that no long row delays the others.

    tiles     rows of one query, or parts of longer rows; each sees some keys
    pieces    a tile's keys, `piece` at a time; the last may be shorter
    items     all pieces of all tiles, those of the longest tile first; one program a KV head each

The piece's size is chosen such that the items fit a given number, for a recorded step has a fixed
grid (as FlashInfer plans it). Runs on the host, in numpy. Knows nothing of kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Buffer = TypeVar("Buffer")
Ints = NDArray[np.int64]

# keys that a program multiplies at a time, at most; pieces are multiples of it
KEYS_AT_ONCE = 64
# a shorter piece costs more to merge than it saves: of one query, and of many
MIN_PIECE = 2 * KEYS_AT_ONCE
MIN_TILE_PIECE = 1_024
# programs that fill a GPU of about 130 processors twice
NUM_PROGRAMS = 256
# pads the lists of a recorded step
NO_ITEM = -1
# entries: parts of a recorded step's buffer start at multiples of it, 128 bytes
ALIGNMENT = 32


@dataclass(slots=True, frozen=True)
class Pieces:
    """Where the pieces are: int64 arrays.

    tiles, pieces: [num_items], an item's tile and which of the tile's pieces it is; the items of
    a tile are consecutive. split: the first items of the tiles that have several. size: keys of a
    piece.
    """

    tiles: Ints
    pieces: Ints
    split: Ints
    size: int


def cut(num_keys: Ints, num_extra: int, size: int | None = None, least: int = MIN_PIECE) -> Pieces:
    """The pieces of tiles that see `num_keys` keys each; a tile without keys has one item.

    num_extra: at most so many items more than tiles. size: keys of a piece; None chooses, `least`
    or more.
    """
    size = size or piece_size(num_keys, num_extra, least)
    order = np.argsort(-num_keys, kind="stable")
    counts = np.maximum(1, -(-num_keys[order] // size))
    ends = np.cumsum(counts)
    firsts = ends - counts
    return Pieces(
        tiles=np.repeat(order, counts),
        pieces=np.arange(ends[-1]) - np.repeat(firsts, counts),
        split=firsts[counts > 1],
        size=size,
    )


def piece_size(num_keys: Ints, num_extra: int, least: int = MIN_PIECE) -> int:
    """Keys of a piece, such that there are at most `num_extra` items more than tiles.

    A tile has less than one item more than its share of the keys, so the sum over the tiles fits.
    """
    size = int(num_keys.max())
    if num_extra > 0:
        size = max(least, -(-int(num_keys.sum()) // num_extra))
    return max(1, -(-size // KEYS_AT_ONCE)) * KEYS_AT_ONCE


def num_extra_items(num_tiles: int, num_kv_heads: int) -> int:
    """How many items more than tiles of one query fill a GPU, and balance many tiles."""
    return max(num_tiles, NUM_PROGRAMS // num_kv_heads)


@dataclass(slots=True, frozen=True)
class WorkItems(Generic[Buffer]):
    """The lists that kernels read: int32, numpy arrays or tensors.

    rows, pieces: [num_items], an item's row (NO_ITEM for padding) and its piece. split: as in
    `Pieces`, padded with NO_ITEM. sizes: [2], keys of a piece, and ids from one row of the block
    table to the next.
    """

    rows: Buffer
    pieces: Buffer
    split: Buffer
    sizes: Buffer


@dataclass(slots=True, frozen=True)
class WorkLayout:
    """Room for the items of a recorded step of `num_rows` rows, in a part of its buffer."""

    num_rows: int
    num_items: int

    @property
    def num_entries(self) -> int:
        """Entries of the buffer."""
        return sum(map(aligned, self._lengths))

    @property
    def num_extra(self) -> int:
        return self.num_items - self.num_rows

    @property
    def _lengths(self) -> tuple[int, ...]:
        return (2, self.num_items, self.num_items, min(self.num_rows, self.num_extra))

    def views(self, buffer: Any) -> WorkItems[Any]:
        """The lists in a one-dimensional buffer of `num_entries`."""
        views, start = [], 0
        for length in self._lengths:
            views.append(buffer[start : start + length])
            start += aligned(length)
        sizes, rows, pieces, split = views
        return WorkItems(rows, pieces, split, sizes)


def write(work: WorkItems[NDArray[np.int32]], pieces: Pieces, table_stride: int) -> None:
    """Write the items of rows with one query each, and pad the lists."""
    put(work.rows, pieces.tiles, NO_ITEM)
    put(work.pieces, pieces.pieces, NO_ITEM)
    put(work.split, pieces.split, NO_ITEM)
    work.sizes[:] = pieces.size, table_stride


def put(part: NDArray[np.int32], values: NDArray[Any], padding: int) -> None:
    """Write values to the start of a part of a recorded step's buffer, and pad the rest."""
    part[: len(values)] = values
    part[len(values) :] = padding


def aligned(length: int) -> int:
    """Entries of a part with `length` of them, up to where the next one starts."""
    return -(-length // ALIGNMENT) * ALIGNMENT
