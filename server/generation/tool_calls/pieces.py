"""The pieces of a parsed answer: text and parts of calls.

Owns the conversion of characters to pieces, and the buffer of undecided text. Knows nothing of
the forms of calls.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field


@dataclass(slots=True, frozen=True)
class TextPiece:
    """Text of the answer, never empty."""

    text: str


@dataclass(slots=True, frozen=True)
class CallPiece:
    """A part of a call. name: the tool, in the first part only.

    arguments: the next part of the JSON text. raw: the model's text of this part. is_end: the call
    is complete.
    """

    index: int
    name: str | None = None
    arguments: str = ""
    raw: str = ""
    is_end: bool = False


ParsedPiece = TextPiece | CallPiece


@dataclass(slots=True)
class _Draft:
    """A piece that grows; index None: text."""

    index: int | None = None
    name: str | None = None
    arguments: list[str] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)
    is_end: bool = False

    def finished(self) -> ParsedPiece:
        raw = "".join(self.raw)
        if self.index is None:
            return TextPiece(raw)
        return CallPiece(self.index, self.name, "".join(self.arguments), raw, self.is_end)


class PieceWriter:
    """Collects pieces until `take`. `num_opened` and `num_closed` count calls."""

    def __init__(self) -> None:
        self._drafts: list[_Draft] = []
        self._buffer: list[str] = []
        self.num_opened = 0
        self.num_closed = 0

    def take(self) -> list[ParsedPiece]:
        """The pieces that are certain."""
        drafts, self._drafts = self._drafts, []
        return [draft.finished() for draft in drafts]

    def buffer(self, character: str) -> None:
        """Buffer a character that may be text or a part of a call."""
        self._buffer.append(character)

    def end_calls(self, separators: Collection[str]) -> None:
        """Drop the buffer if it has separators only; else write it as text."""
        if all(character in separators for character in self._buffer):
            self._buffer.clear()
        else:
            self.write_buffer()

    def write_buffer(self) -> None:
        """Write the buffer as text."""
        for character in self._buffer:
            self.write_text(character)
        self._buffer.clear()

    def write_text(self, character: str) -> None:
        if not self._drafts or self._drafts[-1].index is not None:
            self._drafts.append(_Draft())
        self._drafts[-1].raw.append(character)

    def open_call(self, name: str) -> None:
        """Start a call with the buffer as the start of its raw text."""
        self._drafts.append(_Draft(self.num_opened, name, raw=self._buffer))
        self._buffer = []
        self.num_opened += 1

    def write_argument(self, arguments: str, raw: str = "") -> None:
        """The next part of the arguments of the open call."""
        draft = self._open_draft()
        draft.arguments.append(arguments)
        draft.raw.append(raw)

    def close_call(self, *, is_clean: bool = True) -> None:
        """End the open call. is_clean: the buffer is its end; else it stays in the buffer."""
        draft = self._open_draft()
        draft.is_end = True
        self.num_closed += 1
        if is_clean:
            draft.raw += self._buffer
            self._buffer.clear()

    def _open_draft(self) -> _Draft:
        if not self._drafts:
            self._drafts.append(_Draft(self.num_opened - 1))
        return self._drafts[-1]
