"""The log-probabilities of a text completion, as the four lists of OpenAI's first API.

Owns the lists and the offset of each token's text. Knows nothing of choices or of frames.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import TypedDict

from ...generation.events import PromptLogprobs
from ...generation.token_text import TokenEntry, TokenText


class TokenLists(TypedDict):
    """One entry a token in each list.

    token_logprobs, top_logprobs: null for a prompt's first token. text_offset: the characters of
    the choice's text before the token; a special token adds none.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TokenColumns:
    """The growing lists of one choice. num_top: number of likeliest tokens for each token."""

    def __init__(self, num_top: int) -> None:
        self._num_top = num_top
        # A token may end inside a character; the character then starts at that token.
        self._reader = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_chars = 0
        self._lists = _no_lists()

    def add_prompt(self, logprobs: PromptLogprobs) -> None:
        """Add the tokens of the prompt, before all others."""
        for token, entry in zip(logprobs.tokens, logprobs.entries, strict=True):
            if entry is None:
                self._add(token, None, None)
                continue
            # The prompt's own token comes first, whatever its rank.
            top = [candidate for candidate in entry[1:] if candidate.rank <= self._num_top]
            likeliest = _by_text((token.text, token.logprob) for token in (entry[0], *top))
            self._add(token, entry[0].logprob, likeliest)

    def add(self, entries: Sequence[TokenEntry]) -> None:
        """Add the next tokens of the answer."""
        for entry in entries:
            pairs = ((item.token.text, item.logprob) for item in (*entry.top, entry.chosen))
            self._add(entry.chosen.token, entry.chosen.logprob, _by_text(pairs))

    def take(self) -> TokenLists:
        """Return and clear what was added since the last call."""
        lists, self._lists = self._lists, _no_lists()
        return lists

    def _add(
        self, token: TokenText, logprob: float | None, likeliest: dict[str, float] | None
    ) -> None:
        self._lists["tokens"].append(token.text)
        self._lists["token_logprobs"].append(logprob)
        self._lists["top_logprobs"].append(likeliest)
        self._lists["text_offset"].append(self._num_chars)
        self._num_chars += len(self._reader.decode(token.text_bytes or b""))


def _by_text(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Log-probabilities by text. If two tokens have the same text, the first is kept."""
    by_text: dict[str, float] = {}
    for text, logprob in pairs:
        by_text.setdefault(text, logprob)
    return by_text


def _no_lists() -> TokenLists:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
