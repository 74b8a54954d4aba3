"""Finds where the last tokens of a text came before, and what followed them there.

Owns an index of pairs of tokens that grows with the text, as in LZ77: the latest place of each
pair, and from each place the place before it with the same pair. Knows nothing of requests.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import pairwise

# Tokens that one call indexes at most: a millisecond's work.
INDEXED_AT_ONCE = 4096
# Earlier places that a search compares, the latest first, and tokens that it compares at each.
MOST_PLACES, LONGEST_MATCH = 8, 8


class TokenIndex:
    """The pairs of one text, which only grows. Nothing of the text itself is kept."""

    __slots__ = ("_before", "_latest", "_num_indexed")

    def __init__(self) -> None:
        self._latest: dict[tuple[int, int], int] = {}
        # Behind each token but the first: the place before it with the same pair; 0: none.
        self._before = array("i", [0, 0])
        self._num_indexed = 1

    def catch_up(self, token_ids: Sequence[int]) -> bool:
        """Index more of the text; True if all of it but the last token is indexed.

        A call's work is bounded; afterwards it is that of the new tokens alone.
        """
        first = self._num_indexed
        end = min(len(token_ids), first + INDEXED_AT_ONCE)
        if end <= first + 1:
            return end == len(token_ids)
        part = token_ids[first - 1 : end - 1]
        for place, pair in enumerate(pairwise(part), first + 1):
            self._before.append(self._latest.get(pair, 0))
            self._latest[pair] = place
        self._num_indexed = end - 1
        return end == len(token_ids)

    def following(self, token_ids: Sequence[int], count: int) -> list[int]:
        """What followed where most of the last tokens came before: `count` tokens, or none.

        Call it after `catch_up` returned True. At least two tokens match. Behind the text's end
        the found part repeats.
        """
        num_tokens = len(token_ids)
        if num_tokens < 3 or count < 1:
            return []
        place = self._place_of(token_ids)
        if not place:
            return []
        found = list(token_ids[place : place + count])
        period = num_tokens - place
        while len(found) < count:
            found.append(found[len(found) - period])
        return found

    def _place_of(self, token_ids: Sequence[int]) -> int:
        """The place behind the longest match with the last tokens, the latest of equals; 0: none.

        It is called for each request in each step, so it compares tokens one by one and copies
        none: at most places two tokens match and the third does not.
        """
        last = token_ids[-LONGEST_MATCH:]
        place, best, longest = self._latest.get((last[-2], last[-1]), 0), 0, 0
        for _ in range(MOST_PLACES):
            if not place:
                break
            most, length = min(place, len(last)), 2
            while length < most and token_ids[place - 1 - length] == last[-1 - length]:
                length += 1
            if length > longest:
                best, longest = place, length
            if length == len(last):
                break
            place = self._before[place]
        return best
