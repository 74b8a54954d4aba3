"""A conversation: roles, texts, images, tools and calls.

Owns the one form that all schemas produce and prompts are made from. Knows nothing of wire
formats or tokens.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
ToolFormat = Literal["json", "function_tag", "python_list"]
ImagePosition = Literal["auto", "front", "as-sent"]


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
class Tool:
    """A function that the model may ask the client to call.

    parameters: a JSON schema of an object; None: no parameters.
    """

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None

    @property
    def definition(self) -> dict[str, Any]:
        """OpenAI's function object, which chat templates expect; nothing in it is null."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        if self.parameters is not None:
            function["parameters"] = self.parameters
        return {"type": "function", "function": function}

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of the arguments, an object in any case."""
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return self.parameters | {"type": "object"}


@dataclass(slots=True, frozen=True)
class ToolCall:
    """A call in an earlier answer; its result is a later message of the role tool.

    arguments: text if the model wrote no JSON object; it goes unchanged into the prompt.
    """

    name: str
    arguments: dict[str, Any] | str

    @property
    def arguments_text(self) -> str:
        """The arguments as JSON, or as the model wrote them."""
        if isinstance(self.arguments, str):
            return self.arguments
        return json.dumps(self.arguments, ensure_ascii=False)


@dataclass(slots=True, frozen=True)
class Message:
    """One turn: its parts in the order of the prompt.

    tool_calls: the assistant's calls, after its text. A message of the role tool is the result of
    one call.
    """

    role: Role
    parts: tuple[Part, ...]
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def text(self) -> str:
        """All texts of the message, joined by nothing."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def num_chars(self) -> int:
        """The total length of its texts."""
        return sum(len(part.text) for part in self.parts if isinstance(part, TextPart))

    @property
    def images(self) -> tuple[ImagePart, ...]:
        return tuple(part for part in self.parts if isinstance(part, ImagePart))


def arranged(message: Message, position: ImagePosition) -> Message:
    """The same message, its images where they are to stand.

    auto: first if all of them follow all texts, because a question before its image cannot see it;
    else as sent, because a caption belongs to the image beside it. front: always first.
    """
    if position == "front" or (position == "auto" and _has_images_last(message)):
        return with_images_in_front(message)
    return message


def _has_images_last(message: Message) -> bool:
    """Whether a text is there, and no text behind an image."""
    is_image = [isinstance(part, ImagePart) for part in message.parts]
    return is_image == sorted(is_image) and not all(is_image)


def with_images_in_front(message: Message) -> Message:
    """The same message, its images first."""
    texts = tuple(part for part in message.parts if isinstance(part, TextPart))
    return replace(message, parts=message.images + texts)


def with_joined_texts(message: Message) -> Message:
    """The same message, neighbouring texts joined: a list of texts is one text."""
    parts: list[Part] = []
    for is_text, run in itertools.groupby(message.parts, lambda part: isinstance(part, TextPart)):
        if is_text:
            # At once: joining pairs would copy the text again and again.
            parts.append(TextPart("".join(part.text for part in run if isinstance(part, TextPart))))
        else:
            parts += run
    return replace(message, parts=tuple(parts))
