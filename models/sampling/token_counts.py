"""The tokens of a prompt, and how often each token occurs in the answer.

Owns these numbers of one sequence, so that no step counts them again. Knows nothing of penalties,
and imports neither torch nor numpy.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload


class DistinctIds(Sequence[int]):
    """The distinct tokens of a prompt: int64. kept: what the sampler keeps of them."""

    __slots__ = ("ids", "kept")

    def __init__(self, token_ids: Iterable[int]) -> None:
        self.ids = array("q", set(token_ids))
        self.kept: Any = None

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        return self.ids[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids)


@dataclass(slots=True, frozen=True)
class CountsAfter:
    """The counts of an answer and of tokens that may follow it; see `TokenCounts`."""

    token_ids: array[int]
    counts: array[int]


class TokenCounts:
    """token_ids: the distinct tokens, in the order of their first time. counts: one for each.

    Both are int64 and change with the next `add`: read them before, and copy what you keep. An
    array cannot grow while another object reads its memory.
    """

    __slots__ = ("_places", "counts", "token_ids")

    def __init__(self) -> None:
        self.token_ids, self.counts = array("q"), array("q")
        self._places: dict[int, int] = {}

    def add(self, token_id: int) -> None:
        """Count one more token."""
        place = self._places.setdefault(token_id, len(self.token_ids))
        if place == len(self.token_ids):
            self.token_ids.append(token_id)
            self.counts.append(0)
        self.counts[place] += 1

    def after(self, more: Sequence[int]) -> CountsAfter:
        """A copy that counts these tokens too."""
        copy = CountsAfter(self.token_ids[:], self.counts[:])
        places: dict[int, int] = {}
        for token_id in more:
            place = self._places.get(token_id)
            if place is None:
                place = places.setdefault(token_id, len(copy.token_ids))
            if place == len(copy.token_ids):
                copy.token_ids.append(token_id)
                copy.counts.append(0)
            copy.counts[place] += 1
        return copy
