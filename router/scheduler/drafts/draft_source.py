"""The drafts of one request: what its grammar forces, else what its text had before.

Owns the request's index and its number of drafts. Whether drafts are right, the model decides.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ....models.batch import TokenMatcher
from .draft_length import DraftLength
from .token_index import TokenIndex


class DraftSource:
    """Drafts for one sequence of tokens. most: --num-speculative-tokens.

    vocab_size: a prompt's tokens from there on, such as `<|image|>`, have no logit.
    """

    __slots__ = ("_index", "_is_forced", "_length", "_most", "_vocab_size")

    def __init__(self, most: int, vocab_size: int) -> None:
        self._most, self._vocab_size = most, vocab_size
        self._index = TokenIndex()
        self._length = DraftLength(most)
        self._is_forced = False

    def next(
        self,
        token_ids: Sequence[int],
        matcher: TokenMatcher | None,
        ends: Collection[int],
        most: int,
    ) -> list[int]:
        """At most `most` drafts behind these tokens.

        matcher: at its position behind them. ends: tokens that end the answer, which are no drafts.
        """
        most = min(most, self._most)
        forced = matcher.forced()[:most] if matcher is not None else []
        self._is_forced = bool(forced)
        drafts = forced or self._from_text(token_ids, most)
        for place, token_id in enumerate(drafts):
            if token_id in ends or token_id >= self._vocab_size:
                drafts = drafts[:place]
                break
        if drafts and matcher is not None:
            drafts = drafts[: matcher.num_allowed(drafts)]
        return drafts

    def _from_text(self, token_ids: Sequence[int], most: int) -> list[int]:
        if not self._index.catch_up(token_ids):
            return []
        return self._index.following(token_ids, min(most, self._length.take()))

    def record(self, num_drafts: int, num_right: int) -> None:
        """How many of the last drafts, from the first, were right."""
        if not self._is_forced:
            self._length.record(num_drafts, num_right)
