"""Turns one request's token ids into text, piece by piece.

Owns half characters and stop strings. A piece never holds a part of a
character, nor text that may still become a stop string; all pieces joined are
the plain answer. Knows nothing of requests or of HTTP.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

# No character is as long; only bytes that never become text are.
MAX_UNREAD = 64


@dataclass(slots=True, frozen=True)
class Piece:
    """Text that is due now; stop is the stop string that ended the answer, if one did."""

    text: str
    stop: str | None = None


class StopStrings:
    """Holds text back while it may still be the start of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> Piece:
        """The text that may go out now, cut before the earliest stop string."""
        if not self._stops:
            return Piece(text)
        self._held += text
        stop = self._earliest()
        if stop is not None:
            return Piece(self._held[: self._held.index(stop)], stop)
        return Piece(self._release(self._num_held_back()))

    def flush(self) -> str:
        """What is still held: the answer ended and no stop string came of it."""
        return self._release(0)

    def _earliest(self) -> str | None:
        found = [(self._held.index(stop), stop) for stop in self._stops if stop in self._held]
        return min(found, key=lambda hit: hit[0])[1] if found else None

    def _num_held_back(self) -> int:
        """The length of the longest tail that begins a stop string."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0

    def _release(self, num_kept: int) -> str:
        cut = len(self._held) - num_kept
        text, self._held = self._held[:cut], self._held[cut:]
        return text


class Detokenizer:
    """The text of one growing sequence; special tokens have none unless shows_special.

    special_ids: the tokenizer's, so that a run of them costs nothing.
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
        """The text that is complete with this token.

        Tokens that end inside a character wait in `_unread` for the rest of it.
        """
        if token_id in self._special_ids:
            return ""
        text = self._step(token_id)
        if len(self._unread) > MAX_UNREAD:
            text += self._give_up_on_unread()
        return text

    def flush(self) -> str:
        """The tail: a character that never became whole (as U+FFFD)."""
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
        """The text of bytes that are no characters: a stream of them would be decoded
        from its beginning with each token. The last few may still become one."""
        settled, open_end = self._unread[:-3], self._unread[-3:]
        self._stream = DecodeStream(skip_special_tokens=self._skips)
        self._unread.clear()
        text: str = self._tokenizer.decode(settled, skip_special_tokens=self._skips)
        return text + "".join(map(self._step, open_end))
