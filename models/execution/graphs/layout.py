"""The layout of a padded decode step's inputs in one buffer, a numpy array or a torch tensor.

    token_ids | positions | slots | key_lens | text_table | row_mask | cross_lens | cross_table
    [size]      [size]      [size]  [size]     [size, ..]  [size]     [size]       [size, ..]
    `------------------- a step of text alone ----------'

All int32, one row a sequence, each part at a multiple of ALIGNMENT. A padding row changes nothing
and reads nothing: its slot is -1, it has no keys and sees no image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...kv_cache.step_inputs import StepInputs

Buffer = TypeVar("Buffer")
Ints = NDArray[np.int32]

# entries; 128 bytes
ALIGNMENT = 32
NO_SLOT = -1


@dataclass(slots=True, frozen=True)
class Parts(Generic[Buffer]):
    """The parts of the buffer, in the order and shapes above."""

    token_ids: Buffer
    positions: Buffer
    slots: Buffer
    key_lens: Buffer
    text_table: Buffer
    row_mask: Buffer
    cross_lens: Buffer
    cross_table: Buffer


@dataclass(slots=True, frozen=True)
class Layout:
    """The parts of a step of `size` rows. text_width, cross_width: blocks in a row's table."""

    size: int
    text_width: int
    cross_width: int

    def num_entries(self, has_images: bool) -> int:
        """How many entries of the buffer a step uses."""
        shapes = self._shapes()
        return sum(map(_aligned, shapes if has_images else shapes[:5]))

    def parts(self, buffer: Any) -> Parts[Any]:
        """Views into a one-dimensional buffer of at least `num_entries(True)`."""
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
        rows = (self.size,)
        text, cross = (self.size, self.text_width), (self.size, self.cross_width)
        return [rows, rows, rows, rows, text, rows, rows, cross]


def write(parts: Parts[Ints], inputs: StepInputs) -> None:
    """Write a step that the parts' layout takes.

    Tables keep ids of earlier steps after a row's own ids; a row's keys end before them.
    """
    rows, cross = inputs.text_rows, inputs.cross_rows
    _put(parts.token_ids, inputs.token_ids, 0)
    _put(parts.positions, inputs.positions, 0)
    _put(parts.slots, inputs.text_slots, NO_SLOT)
    _put(parts.key_lens, rows.key_lens, 0)
    _put_table(parts.text_table, rows.block_table)
    if cross is not None:
        _put(parts.row_mask, inputs.sees_image, 0)
        _put(parts.cross_lens, cross.key_lens, 0)
        _put_table(parts.cross_table, cross.block_table)


def _put(part: Ints, values: NDArray[Any], padding: int) -> None:
    part[: len(values)] = values
    part[len(values) :] = padding


def _put_table(part: Ints, table: NDArray[np.int64]) -> None:
    num_rows, width = table.shape
    part[:num_rows, :width] = table


def _count(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def _aligned(shape: tuple[int, ...]) -> int:
    return -(-_count(shape) // ALIGNMENT) * ALIGNMENT
