"""A conversation as every API hands it on: roles, texts and image places.

Owns the one form that the schemas end in and the prompt begins with. Knows
nothing of any wire format, nor of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(slots=True, frozen=True)
class TextPart:
    text: str


@dataclass(slots=True, frozen=True)
class ImagePart:
    """A picture by its URL; field is its place in the client's body, for errors.

    max_tiles None leaves the number of tiles to the checkpoint.
    """

    url: str
    field: str
    max_tiles: int | None = None


Part = TextPart | ImagePart


@dataclass(slots=True, frozen=True)
class Message:
    """One turn: its parts in the order in which the model is to read them."""

    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """All texts of the message, joined by nothing."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def images(self) -> tuple[ImagePart, ...]:
        return tuple(part for part in self.parts if isinstance(part, ImagePart))


def with_images_in_front(message: Message) -> Message:
    """The same message, its images first: a question before its image cannot see it."""
    texts = tuple(part for part in message.parts if isinstance(part, TextPart))
    return replace(message, parts=message.images + texts)


def with_joined_texts(message: Message) -> Message:
    """The same message, neighbouring texts joined: a list of texts is one text."""
    parts: list[Part] = []
    for part in message.parts:
        previous = parts[-1] if parts else None
        if isinstance(part, TextPart) and isinstance(previous, TextPart):
            parts[-1] = TextPart(previous.text + part.text)
        else:
            parts.append(part)
    return replace(message, parts=tuple(parts))
