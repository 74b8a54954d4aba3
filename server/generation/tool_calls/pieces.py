"""What a parsed answer is made of: text and parts of calls.

Owns how single characters become pieces, and what is held back. Knows nothing
of the forms of calls.
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
    """A part of a call. name: of the tool, with the first part only.

    arguments: the next part of their JSON text. raw: what the model wrote for
    this part. is_end: the call is complete.
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
    """Gathers pieces until they are taken. `num_opened` and `num_closed` count calls."""

    def __init__(self) -> None:
        self._drafts: list[_Draft] = []
        self._held: list[str] = []
        self.num_opened = 0
        self.num_closed = 0

    def take(self) -> list[ParsedPiece]:
        """The pieces that are certain."""
        drafts, self._drafts = self._drafts, []
        return [draft.finished() for draft in drafts]

    def hold(self, character: str) -> None:
        """Keep a character back that may be text or a part of a call."""
        self._held.append(character)

    def end_calls(self, separators: Collection[str]) -> None:
        """What was held behind the last call is nobody's if it only separates calls, else text."""
        if all(character in separators for character in self._held):
            self._held.clear()
        else:
            self.write_held()

    def write_held(self) -> None:
        """What was held is text after all."""
        for character in self._held:
            self.write_text(character)
        self._held.clear()

    def write_text(self, character: str) -> None:
        if not self._drafts or self._drafts[-1].index is not None:
            self._drafts.append(_Draft())
        self._drafts[-1].raw.append(character)

    def open_call(self, name: str) -> None:
        """Begin a call; what was held is its beginning."""
        self._drafts.append(_Draft(self.num_opened, name, raw=self._held))
        self._held = []
        self.num_opened += 1

    def write_argument(self, arguments: str, raw: str = "") -> None:
        """The next part of the arguments of the open call."""
        draft = self._open_draft()
        draft.arguments.append(arguments)
        draft.raw.append(raw)

    def close_call(self, *, is_clean: bool = True) -> None:
        """The open call is complete; what was held is its end, or not its own."""
        draft = self._open_draft()
        draft.is_end = True
        self.num_closed += 1
        if is_clean:
            draft.raw += self._held
            self._held.clear()

    def _open_draft(self) -> _Draft:
        if not self._drafts:
            self._drafts.append(_Draft(self.num_opened - 1))
        return self._drafts[-1]
