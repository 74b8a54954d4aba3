"""Turns one request's token ids into text, piece by piece.

Owns incomplete characters and stop strings. A piece has no part of a character, and no text that
may still become a stop string. All pieces joined are the whole answer. Knows nothing of requests
or HTTP.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

# Longer than any character: more bytes never become text.
MAX_UNREAD = 64


@dataclass(slots=True, frozen=True)
class Piece:
    """Text to send now. stop: the stop string that ended the answer, if any."""

    text: str
    stop: str | None = None


class StopStrings:
    """Buffers text while it may still be the start of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._buffer = ""

    def push(self, text: str) -> Piece:
        """The text to send now, cut before the earliest stop string."""
        if not self._stops:
            return Piece(text)
        self._buffer += text
        stop = self._earliest()
        if stop is not None:
            return Piece(self._buffer[: self._buffer.index(stop)], stop)
        return Piece(self._release(self._num_undecided()))

    def flush(self) -> str:
        """The buffered text, at the end of the answer."""
        return self._release(0)

    def _earliest(self) -> str | None:
        found = [(self._buffer.index(stop), stop) for stop in self._stops if stop in self._buffer]
        return min(found, key=lambda hit: hit[0])[1] if found else None

    def _num_undecided(self) -> int:
        """The length of the longest tail that starts a stop string."""
        for length in range(min(self._longest - 1, len(self._buffer)), 0, -1):
            if any(stop.startswith(self._buffer[-length:]) for stop in self._stops):
                return length
        return 0

    def _release(self, num_kept: int) -> str:
        cut = len(self._buffer) - num_kept
        text, self._buffer = self._buffer[:cut], self._buffer[cut:]
        return text


class Detokenizer:
    """The text of one growing sequence; special tokens have none unless shows_special.

    special_ids: the tokenizer's, so that they are skipped at once.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        special_ids: Container[int] = frozenset(),
        *,
        shows_special: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._special_ids = frozenset() if shows_special else special_ids
        self._skips = not shows_special
        self._stream = DecodeStream(skip_special_tokens=self._skips)
        self._unread: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token completes.

        Tokens that end inside a character wait in `_unread` for the rest.
        """
        if token_id in self._special_ids:
            return ""
        text = self._step(token_id)
        if len(self._unread) > MAX_UNREAD:
            text += self._give_up_on_unread()
        return text

    def flush(self) -> str:
        """The rest: an incomplete character, as U+FFFD."""
        tail: str = self._tokenizer.decode(self._unread, skip_special_tokens=self._skips)
        self._unread.clear()
        return tail

    def _step(self, token_id: int) -> str:
        text = self._stream.step(self._tokenizer, token_id)
        if text is None:
            self._unread.append(token_id)
            return ""
        self._unread.clear()
        return text

    def _give_up_on_unread(self) -> str:
        """The text of bytes that are no characters; the last few may still become one.

        Otherwise each further token would decode all of them again.
        """
        settled, open_end = self._unread[:-3], self._unread[-3:]
        self._stream = DecodeStream(skip_special_tokens=self._skips)
        self._unread.clear()
        text: str = self._tokenizer.decode(settled, skip_special_tokens=self._skips)
        return text + "".join(map(self._step, open_end))
