"""The layout of a padded decode step's inputs in one buffer, a numpy array or a torch tensor.

    token_ids | positions | slots | sampled | key_lens | text_work | row_mask | cross_lens
    [size]      [size]      [size]  [size]    [size]     [..]        [size]     [size]

    | cross_work | cross_table | text_table
      [..]         [size, ..]    [size * ..]

All int32, one row a sequence, each part at a multiple of 128 bytes. A padding row changes nothing
and reads nothing: its slot is -1, it has no keys and sees no image. The text table is last and its
rows are as long as the step's longest, so that a step copies what it uses of it. The work parts
are the items of attention (`attention/work_items.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...attention.triton_paged import TritonBackend
from ...attention.work_items import WorkLayout, aligned, put
from ...kv_cache.step_inputs import StepInputs

Buffer = TypeVar("Buffer")
Ints = NDArray[np.int32]

NO_SLOT = -1


@dataclass(slots=True, frozen=True)
class Parts(Generic[Buffer]):
    """The parts of the buffer, in the order and shapes above."""

    token_ids: Buffer
    positions: Buffer
    slots: Buffer
    sampled: Buffer
    key_lens: Buffer
    text_work: Buffer
    row_mask: Buffer
    cross_lens: Buffer
    cross_work: Buffer
    cross_table: Buffer
    text_table: Buffer


@dataclass(slots=True, frozen=True)
class Layout:
    """The parts of a step of `size` rows. text_width, cross_width: most blocks in a row's table.

    text_work, cross_work: room for the items of attention.
    """

    size: int
    text_width: int
    cross_width: int
    text_work: WorkLayout
    cross_work: WorkLayout

    @property
    def num_entries(self) -> int:
        """Entries of the buffer that the largest step uses."""
        return sum(map(_aligned, self._shapes()))

    @property
    def num_fixed(self) -> int:
        """Entries of the buffer before the text table."""
        return sum(map(_aligned, self._shapes()[:-1]))

    def parts(self, buffer: Any) -> Parts[Any]:
        """Views into a one-dimensional buffer of at least `num_entries`."""
        views, start = [], 0
        for shape in self._shapes():
            views.append(buffer[start : start + _count(shape)].reshape(shape))
            start += _aligned(shape)
        return Parts(*views)

    def takes(self, inputs: StepInputs) -> bool:
        """Whether the step has one token a row and its rows and tables fit."""
        num_rows = len(inputs.text_rows.key_lens)
        fits = num_rows == inputs.text_rows.num_queries and num_rows <= self.size
        if not fits or inputs.text_rows.block_table.shape[1] > self.text_width:
            return False
        cross = inputs.cross_rows
        return cross is None or (
            len(cross.key_lens) == num_rows and cross.block_table.shape[1] <= self.cross_width
        )

    def _shapes(self) -> list[tuple[int, ...]]:
        rows, cross = (self.size,), (self.size, self.cross_width)
        works = [(work.num_entries,) for work in (self.text_work, self.cross_work)]
        table = (self.size * self.text_width,)
        return [*[rows] * 5, works[0], rows, rows, works[1], cross, table]


def write_padding(layout: Layout, parts: Parts[Ints], backend: TritonBackend) -> None:
    """Write a step of padding rows."""
    for part in (getattr(parts, name) for name in parts.__slots__):
        part[...] = 0
    parts.slots[:] = NO_SLOT
    _write_text_work(layout, parts, layout.text_width, backend)
    _write_cross_work(layout, parts, backend)


def write(layout: Layout, parts: Parts[Ints], inputs: StepInputs, backend: TritonBackend) -> None:
    """Write a step that the layout takes.

    Tables keep ids of earlier steps after a row's own ids; a row's keys end before them.
    """
    rows, cross = inputs.text_rows, inputs.cross_rows
    put(parts.token_ids, inputs.token_ids, 0)
    put(parts.positions, inputs.positions, 0)
    put(parts.slots, inputs.text_slots, NO_SLOT)
    put(parts.sampled, inputs.sampled, 0)
    put(parts.key_lens, rows.key_lens, 0)
    num_rows, width = rows.block_table.shape
    parts.text_table[: num_rows * width] = rows.block_table.reshape(-1)
    _write_text_work(layout, parts, width, backend)
    if cross is not None:
        put(parts.row_mask, inputs.sees_image, 0)
        put(parts.cross_lens, cross.key_lens, 0)
        parts.cross_table[:num_rows, : cross.block_table.shape[1]] = cross.block_table
        _write_cross_work(layout, parts, backend)


def _write_text_work(
    layout: Layout, parts: Parts[Ints], width: int, backend: TritonBackend
) -> None:
    backend.write_work(layout.text_work.views(parts.text_work), parts.key_lens, width)


def _write_cross_work(layout: Layout, parts: Parts[Ints], backend: TritonBackend) -> None:
    work = layout.cross_work.views(parts.cross_work)
    backend.write_work(work, parts.cross_lens, layout.cross_width)


def _count(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def _aligned(shape: tuple[int, ...]) -> int:
    return aligned(_count(shape))
