"""The log-probabilities of a text completion, as the four lists of OpenAI's first API.

Owns the lists and the offset of each token's text. Knows nothing of choices or of frames.
"""

from __future__ import annotations

import codecs
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

from ...generation.events import PromptLogprobs
from ...generation.token_text import TokenEntry, TokenText
from ..json_parts import JsonList


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
        self.num_chars = 0
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

    def end_text(self) -> None:
        """What follows is read by itself: half a character at the end counts as one."""
        self.num_chars += len(self._reader.decode(b"", final=True))

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
        self._lists["text_offset"].append(self.num_chars)
        self.num_chars += len(self._reader.decode(token.text_bytes or b""))


class ColumnTexts:
    """The same lists as JSON text from the start, for an answer that is not streamed."""

    def __init__(self, num_top: int) -> None:
        self._columns = TokenColumns(num_top)
        self._texts = {name: JsonList() for name in ("tokens", "token_logprobs", "top_logprobs")}
        # Numbers, as an echoed prompt moves them.
        self._offsets = array("Q")

    @property
    def num_entries(self) -> int:
        return len(self._offsets)

    def add_prompt(self, logprobs: PromptLogprobs) -> None:
        """Add the tokens of the prompt, before all others."""
        self._columns.add_prompt(logprobs)
        self._columns.end_text()
        self._keep()

    def add(self, entries: Sequence[TokenEntry]) -> None:
        """Add the next tokens of the answer."""
        self._columns.add(entries)
        self._keep()

    def append(self, later: ColumnTexts) -> None:
        """Add all tokens of `later`, whose offsets start at 0."""
        for name, text in self._texts.items():
            text.append(later._texts[name])
        start = self._columns.num_chars
        self._offsets.extend(start + offset for offset in later._offsets)

    def as_json(self) -> Any:
        """The lists as values of a document for `json_parts`."""
        lists: dict[str, Any] = {name: text.as_json() for name, text in self._texts.items()}
        return lists | {"text_offset": self._offsets.tolist()}

    def _keep(self) -> None:
        lists = self._columns.take()
        self._texts["tokens"].extend(lists["tokens"])
        self._texts["token_logprobs"].extend(lists["token_logprobs"])
        self._texts["top_logprobs"].extend(lists["top_logprobs"])
        self._offsets.extend(lists["text_offset"])


def _by_text(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Log-probabilities by text. If two tokens have the same text, the first is kept."""
    by_text: dict[str, float] = {}
    for text, logprob in pairs:
        by_text.setdefault(text, logprob)
    return by_text


def _no_lists() -> TokenLists:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
