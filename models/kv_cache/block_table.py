"""A sequence's blocks as an array that grows with it, so that no step reads them one by one.

Owns a copy of a list of block ids, in memory that numpy can read. Knows nothing of pools or steps.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import overload

# Ids that fit behind the first ones before the array is made anew.
_ROOM = 16


class BlockView(Sequence[int]):
    """The first blocks of a sequence.

    ids: int32, the first of which are these blocks; not to be changed. extremes: the lowest and the
    highest id of the whole table; none if it is empty.
    """

    __slots__ = ("_num", "extremes", "ids")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, ids: array[int], num: int, extremes: tuple[int, ...]) -> None:
        self.ids, self._num, self.extremes = ids, num, extremes

    def __len__(self) -> int:
        return self._num

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self.ids[: self._num].tolist()[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids[: self._num])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        return f"BlockView({list(self)})"


class BlockTable:
    """A list of block ids that is only appended to, as an array.

    Another list starts it anew. Each id is read once, so the work of a step does not grow with the
    blocks before its own.
    """

    __slots__ = ("_extremes", "_ids", "_num", "_source")

    def __init__(self) -> None:
        self._start([])

    def first(self, block_ids: list[int], num_blocks: int) -> BlockView:
        """The first num_blocks of these ids; all of them if they are fewer."""
        if block_ids is not self._source:
            self._start(block_ids)
        if len(block_ids) > self._num:
            self._append(block_ids[self._num :])
        return BlockView(self._ids, min(num_blocks, self._num), self._extremes)

    def _start(self, source: list[int]) -> None:
        self._source, self._num = source, 0
        self._ids = _zeros(_ROOM)
        self._extremes: tuple[int, ...] = ()

    def _append(self, more: list[int]) -> None:
        end = self._num + len(more)
        if end > len(self._ids):
            # An array whose memory numpy reads must not be resized: views keep the old one.
            larger = _zeros(end + end // 2 + _ROOM)
            larger[: self._num] = self._ids[: self._num]
            self._ids = larger
        self._ids[self._num : end] = array("i", more)
        self._num = end
        known = (*self._extremes, *more)
        self._extremes = min(known), max(known)


def _zeros(num: int) -> array[int]:
    return array("i", bytes(num * array("i").itemsize))


def extremes(block_ids: Sequence[int]) -> Sequence[int]:
    """Ids that are in a range exactly if all are: a view's lowest and highest, else all."""
    return block_ids.extremes if isinstance(block_ids, BlockView) else block_ids
