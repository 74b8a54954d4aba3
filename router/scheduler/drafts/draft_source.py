"""The drafts of one request: what its grammar forces, else what its text had before.

Owns the request's index, and the share of right drafts, its own and that of all requests. Whether
drafts are right, the model decides; how many are computed, `throughput.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate, repeat
from operator import mul

from ....models.batch import TokenMatcher
from .token_index import TokenIndex

# What is expected of the first drafts of all, and the weight of a new one: for the request's own
# share, and for that of all requests.
FIRST_SHARE, NEW_DRAFT, NEW_DRAFT_OF_ALL = 0.5, 0.125, 1 / 64


class Shares:
    """The share of right drafts by their source, `grammar` or `text`."""

    __slots__ = ("_by_source", "_weight")

    def __init__(self, weight: float = NEW_DRAFT_OF_ALL, start: Shares | None = None) -> None:
        """weight: of a new draft. start: the shares to start from."""
        self._weight = weight
        self._by_source: dict[str, float] = {"grammar": FIRST_SHARE, "text": FIRST_SHARE}
        if start is not None:
            self._by_source |= start._by_source

    def __getitem__(self, source: str) -> float:
        return self._by_source[source]

    def record(self, source: str, is_right: bool) -> None:
        share = self._by_source[source]
        self._by_source[source] = share + self._weight * (is_right - share)


class DraftSource:
    """Drafts for one sequence of tokens. most: --num-speculative-tokens.

    vocab_size: a prompt's tokens from there on, such as `<|image|>`, have no logit. of_all: the
    shares of all requests, where this one's start.
    """

    __slots__ = (
        "_drafts",
        "_index",
        "_most",
        "_of_all",
        "_shares",
        "_source",
        "_sources",
        "_vocab_size",
    )

    def __init__(self, most: int, vocab_size: int, of_all: Shares) -> None:
        self._most, self._vocab_size = most, vocab_size
        self._index = TokenIndex()
        self._drafts: list[int] = []
        self._source = "text"
        self._sources: tuple[str, ...] = ("text",)  # those that the request has
        self._of_all, self._shares = of_all, Shares(NEW_DRAFT, of_all)

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
        most = max(0, min(most, self._most))
        self._sources = ("text",) if matcher is None else ("text", "grammar")
        forced = matcher.forced()[:most] if matcher is not None and most else []
        self._source = "grammar" if forced else "text"
        drafts = forced or self._from_text(token_ids, most)
        for place, token_id in enumerate(drafts):
            if token_id in ends or token_id >= self._vocab_size:
                drafts = drafts[:place]
                break
        if drafts and matcher is not None:
            drafts = drafts[: matcher.num_allowed(drafts)]
        self._drafts = drafts
        return drafts

    def _from_text(self, token_ids: Sequence[int], most: int) -> list[int]:
        if not self._index.catch_up(token_ids):
            return []
        return self._index.following(token_ids, most)

    def chances(self) -> list[float]:
        """Of each of the last drafts, that it and all before it are right."""
        return self._chances(self._source, len(self._drafts))

    def highest_chances(self) -> list[float]:
        """The chances of as many drafts as a look-up gives, if it finds any."""
        likeliest = max(self._sources, key=self._shares.__getitem__)
        return self._chances(likeliest, self._most)

    def _chances(self, source: str, count: int) -> list[float]:
        share = self._shares[source]
        return list(accumulate(repeat(share, count), mul))

    def record(self, token_ids: Sequence[int]) -> None:
        """The tokens that followed: the share of right drafts changes, computed or not.

        So drafts that are never computed, since few were right, are when they become right.
        """
        for draft, token_id in zip(self._drafts, token_ids, strict=False):
            for shares in (self._shares, self._of_all):
                shares.record(self._source, draft == token_id)
            if draft != token_id:
                break
        self._drafts = []
