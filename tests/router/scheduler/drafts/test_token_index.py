"""Where a text's last tokens came before: compared with a search of the whole text."""

from __future__ import annotations

import numpy as np
import pytest
from support.counted_list import CountedList

from vlmserve.router.scheduler.drafts import token_index
from vlmserve.router.scheduler.drafts.token_index import LONGEST_MATCH, MOST_PLACES, TokenIndex


def searched(token_ids: list[int], count: int) -> list[int]:
    """The same by looking at every place."""
    num_tokens, pair = len(token_ids), token_ids[-2:]
    places = [p for p in range(2, num_tokens) if token_ids[p - 2 : p] == pair][::-1]
    if not places:
        return []

    def length(place: int) -> int:
        most = min(place, LONGEST_MATCH)
        return next((n for n in range(most) if token_ids[place - 1 - n] != token_ids[-1 - n]), most)

    best = max(places[:MOST_PLACES], key=length)
    text = list(token_ids)
    for place in range(best, best + count):
        text.append(text[place])
    return text[num_tokens:]


@pytest.mark.parametrize("seed", range(6))
def test_it_finds_what_a_search_of_the_whole_text_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    text = rng.integers(0, 3 + seed, 300).tolist()
    index, num_found = TokenIndex(), 0
    for num_tokens in range(1, len(text)):
        known = text[:num_tokens]
        assert index.catch_up(known)
        found = index.following(known, 5)
        assert found == (searched(known, 5) if num_tokens > 2 else [])
        num_found += bool(found)
    assert num_found > 100


def test_a_long_text_is_indexed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_index, "INDEXED_AT_ONCE", 10)
    text = [1, 2, 3, 4, *range(10, 30), 1, 2]
    index = TokenIndex()
    assert [index.catch_up(text) for _ in range(3)] == [False, False, True]
    assert index.following(text, 3) == [3, 4, 10]


def test_a_token_more_reads_as_much_of_a_long_text_as_of_a_short_one() -> None:
    reads = []
    for num_tokens in (100, 30_000):
        text = CountedList([7, 8] * num_tokens)
        index = TokenIndex()
        while not index.catch_up(text):
            pass
        text.append(7)
        text.num_read = 0
        assert index.catch_up(text)
        assert index.following(text, 4) == [8, 7, 8, 7]
        reads.append(text.num_read)
    assert reads[0] == reads[1]
    assert reads[0] < 100
