"""How likely a request's drafts are, and which tokens are no drafts."""

from __future__ import annotations

import pytest

from vlmserve.router.scheduler.drafts.draft_source import FIRST_SHARE, DraftSource, Shares

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


def test_each_right_draft_makes_the_next_likelier_and_a_wrong_one_less() -> None:
    source = DraftSource(8, 1000, Shares())
    shares = []
    for followed in ([3, 4, 5, 6], [3, 9], [9], [9], [9, 4, 5, 6]):
        assert source.next(TEXT, None, set(), 4) == [3, 4, 5, 6]
        share, *others = source.chances()
        assert others == pytest.approx([share**2, share**3, share**4])
        shares.append(share)
        source.record(followed)
    assert shares[0] == FIRST_SHARE < shares[2] < shares[1]
    assert shares[4] < shares[3] < shares[2]


def test_drafts_that_are_not_computed_count_too_and_only_once() -> None:
    source = DraftSource(8, 1000, Shares())
    for _ in range(30):
        source.next(TEXT, None, set(), 1)
        source.record([9])
    assert source.next(TEXT, None, set(), 1) == [3]
    assert source.chances()[0] < 0.02
    for _ in range(30):
        source.next(TEXT, None, set(), 1)
        source.record([3])
        source.record([9])  # a step without a look-up
    source.next(TEXT, None, set(), 1)
    assert source.chances()[0] > 0.9


def test_drafts_end_before_a_stop_token_and_before_a_token_without_a_logit() -> None:
    assert DraftSource(8, 1000, Shares()).next(TEXT, None, {5}, 8) == [3, 4]
    assert DraftSource(8, 4, Shares()).next(TEXT, None, set(), 8) == [3]
    assert DraftSource(2, 1000, Shares()).next(TEXT, None, set(), 8) == [3, 4]
    assert DraftSource(8, 1000, Shares()).next(TEXT, None, set(), 1) == [3]


def test_a_grammar_s_forced_tokens_come_first_and_forbidden_drafts_never() -> None:
    assert DraftSource(8, 1000, Shares()).next(TEXT, Forcing([4, 4]), set(), 8) == [4, 4]
    assert DraftSource(8, 1000, Shares()).next(TEXT, Forcing([]), set(), 8) == [3, 4, 5]


def test_wrong_forced_tokens_make_no_drafts_from_the_text_less_likely() -> None:
    source = DraftSource(8, 1000, Shares())
    assert source.next(TEXT, Forcing([4]), set(), 8) == [4]
    source.record([9])
    assert source.next(TEXT, Forcing([4]), set(), 8) == [4]
    assert source.chances()[0] < FIRST_SHARE
    assert source.next(TEXT, None, set(), 8) == [3, 4, 5, 6, 1, 2, 3, 4]
    assert source.chances()[0] == FIRST_SHARE


def test_a_new_request_starts_where_those_before_it_ended() -> None:
    of_all = Shares()
    for is_right in (False, True):
        for _ in range(300):
            source = DraftSource(8, 1000, of_all)
            source.next(TEXT, None, set(), 1)
            source.record([3 if is_right else 9])
        new = DraftSource(8, 1000, of_all)
        new.next(TEXT, None, set(), 1)
        (share,) = new.chances()
        assert share == of_all["text"]
        assert share > 0.9 if is_right else share < 0.1
        assert of_all["grammar"] == FIRST_SHARE


def test_one_request_moves_the_share_of_all_little() -> None:
    of_all = Shares()
    source = DraftSource(8, 1000, of_all)
    for _ in range(3):
        source.next(TEXT, None, set(), 1)
        source.record([9])
    source.next(TEXT, None, set(), 1)
    assert FIRST_SHARE - 0.03 < of_all["text"] < FIRST_SHARE
    assert source.chances()[0] < FIRST_SHARE - 0.1
