"""How many drafts a request gets, and which tokens are no drafts."""

from __future__ import annotations

from vlmserve.router.scheduler.drafts.draft_length import CPU_TOKENS, DraftLength, room_for_drafts
from vlmserve.router.scheduler.drafts.draft_source import DraftSource

TEXT = [1, 2, 3, 4, 5, 6, 1, 2]


class Forcing:
    """A matcher that forces tokens and allows those up to 5."""

    has_failed = False

    def __init__(self, forced: list[int]) -> None:
        self._forced = forced

    def accept(self, token_id: int) -> None:
        raise AssertionError("drafting moves no matcher")

    def copy(self) -> Forcing:
        return self

    def num_allowed(self, token_ids: list[int]) -> int:
        return next((i for i, one in enumerate(token_ids) if one > 5), len(token_ids))

    def forced(self) -> list[int]:
        return self._forced


def test_right_drafts_get_more_and_wrong_ones_fewer_and_then_a_pause() -> None:
    length = DraftLength(8)
    assert length.take() == 4
    length.record(4, 4)
    assert length.take() == 8
    length.record(8, 2)
    assert length.take() == 3
    length.record(3, 0)
    assert length.take() == 1
    length.record(1, 0)
    assert [length.take() for _ in range(4)] == [0, 0, 1, 1]
    length.record(1, 0)
    assert [length.take() for _ in range(5)] == [0, 0, 0, 0, 1]
    for _ in range(20):
        length.record(1, 0)
    pauses = 0
    while not length.take():
        pauses += 1
    assert pauses == 64
    length.record(1, 1)
    assert length.take() == 2


def test_a_step_has_fewer_drafts_the_more_tokens_it_has() -> None:
    rooms = [room_for_drafts(count, "cpu") for count in (1, 8, CPU_TOKENS, 500)]
    assert rooms == [CPU_TOKENS - 1, CPU_TOKENS - 8, 0, 0]


def test_drafts_end_before_a_stop_token_and_before_a_token_without_a_logit() -> None:
    assert DraftSource(8, 1000).next(TEXT, None, {5}, 8) == [3, 4]
    assert DraftSource(8, 4).next(TEXT, None, set(), 8) == [3]
    assert DraftSource(2, 1000).next(TEXT, None, set(), 8) == [3, 4]
    assert DraftSource(8, 1000).next(TEXT, None, set(), 1) == [3]


def test_a_grammar_s_forced_tokens_come_first_and_forbidden_drafts_never() -> None:
    assert DraftSource(8, 1000).next(TEXT, Forcing([4, 4]), set(), 8) == [4, 4]
    assert DraftSource(8, 1000).next(TEXT, Forcing([]), set(), 8) == [3, 4, 5]


def test_wrong_forced_tokens_pause_no_drafts_from_the_text() -> None:
    source = DraftSource(8, 1000)
    assert source.next(TEXT, Forcing([4]), set(), 8) == [4]
    source.record(1, 0)
    assert source.next(TEXT, None, set(), 8) == [3, 4, 5, 6]
    source.record(4, 0)
    source.record(2, 0)
    assert source.next(TEXT, None, set(), 8) == []
