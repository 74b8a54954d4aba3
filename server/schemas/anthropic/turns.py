"""The conversation of /v1/messages: turns, their content blocks, and the messages that they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from ...errors import BadRequestError
from ...prompts.conversation import ImagePart, Message, Part, TextPart, ToolCall
from ..allowed_values import IMAGES_OF_USERS, Notes
from ..decoding import no_nul
from ..tools import CallId, ToolName

MAX_BLOCKS = 2048

CacheControl = dict[str, Any]


class _Block(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """What all content blocks share. cache_control has no effect: prompts are cached anyway."""


class TextBlock(_Block, frozen=True, tag="text", kw_only=True):
    """citations, parsed_output: taken as an answer had them, without effect."""

    text: str
    cache_control: CacheControl | None = None
    citations: list[Any] | None = None
    parsed_output: Any = None


class Base64Source(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="base64"
):
    """The bytes of a picture file. media_type is not believed: the bytes decide."""

    data: str
    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"]


class UrlSource(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="url"
):
    """A picture that the server fetches, or a data URL."""

    url: str


class ImageBlock(_Block, frozen=True, tag="image", kw_only=True):
    source: Base64Source | UrlSource
    cache_control: CacheControl | None = None


class ToolUseBlock(_Block, frozen=True, tag="tool_use", kw_only=True):
    """A call in an earlier answer. caller: as an answer had it, without effect."""

    id: CallId
    name: ToolName
    input: dict[str, Any]
    caller: dict[str, Any] | None = None
    cache_control: CacheControl | None = None


class ToolResultBlock(_Block, frozen=True, tag="tool_result", kw_only=True):
    """The result of a call. Its pictures are read behind its text, in the user's turn."""

    tool_use_id: CallId
    content: (
        str | Annotated[list[TextBlock | ImageBlock], msgspec.Meta(max_length=MAX_BLOCKS)] | None
    ) = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


class ThinkingBlock(_Block, frozen=True, tag="thinking", kw_only=True):
    """Another model's thinking, echoed: it is left out of the prompt."""

    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(_Block, frozen=True, tag="redacted_thinking", kw_only=True):
    """Another model's hidden thinking, echoed: it is left out of the prompt."""

    data: str


class SystemBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A text of `system`. Not a tagged type: a tag may be absent where only one type fits."""

    notes: ClassVar[Notes] = IMAGES_OF_USERS

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: list[Any] | None = None


SystemBlocks = Annotated[list[SystemBlock], msgspec.Meta(max_length=MAX_BLOCKS)]
UserBlocks = Annotated[
    list[TextBlock | ImageBlock | ToolResultBlock], msgspec.Meta(max_length=MAX_BLOCKS)
]
AssistantBlocks = Annotated[
    list[TextBlock | ToolUseBlock | ThinkingBlock | RedactedThinkingBlock],
    msgspec.Meta(max_length=MAX_BLOCKS),
]


class UserTurn(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="role", tag="user"
):
    notes: ClassVar[Notes] = {
        "type": {
            "document": "Send the pages of a document as images",
            "image_url": 'An image is {"type": "image", "source": ...}',
            "file": "Send the file itself in base64",
        }
    }

    content: str | UserBlocks


class AssistantTurn(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="role", tag="assistant"
):
    notes: ClassVar[Notes] = IMAGES_OF_USERS

    content: str | AssistantBlocks


def messages_of(
    system: str | Sequence[SystemBlock] | None, turns: Sequence[UserTurn | AssistantTurn]
) -> Iterator[Message]:
    """The messages of a conversation. Raises BadRequestError that names the field."""
    if system:
        yield Message("system", _text_parts(system, "system"))
    call_ids: set[str] = set()
    for i, turn in enumerate(turns):
        field = f"messages[{i}].content"
        if isinstance(turn, AssistantTurn):
            yield _assistant_message(turn, field)
            call_ids |= {block.id for block in _blocks(turn) if isinstance(block, ToolUseBlock)}
        else:
            yield from _user_messages(turn, field, call_ids)


def _assistant_message(turn: AssistantTurn, field: str) -> Message:
    if isinstance(turn.content, str):
        return Message("assistant", _text_parts(turn.content, field))
    parts = tuple(
        TextPart(no_nul(block.text, f"{field}[{i}].text"))
        for i, block in enumerate(turn.content)
        if isinstance(block, TextBlock)
    )
    calls = tuple(
        ToolCall(block.name, block.input)
        for block in turn.content
        if isinstance(block, ToolUseBlock)
    )
    return Message("assistant", parts, calls)


def _user_messages(turn: UserTurn, field: str, call_ids: set[str]) -> Iterator[Message]:
    """A message for each result, then one of the user with the pictures of all results."""
    if isinstance(turn.content, str):
        yield Message("user", _text_parts(turn.content, field))
        return
    parts: list[Part] = []
    for i, block in enumerate(turn.content):
        place = f"{field}[{i}]"
        if isinstance(block, ToolResultBlock):
            result = _result_parts(block, place, call_ids)
            yield Message("tool", tuple(part for part in result if isinstance(part, TextPart)))
            parts += [part for part in result if isinstance(part, ImagePart)]
        else:
            parts.append(_part(block, place))
    if parts or not turn.content:
        yield Message("user", tuple(parts))


def _result_parts(block: ToolResultBlock, field: str, call_ids: set[str]) -> tuple[Part, ...]:
    if block.tool_use_id not in call_ids:
        raise BadRequestError(
            f"{field}.tool_use_id is {block.tool_use_id[:64]!r}, which is the id of no tool_use"
            " block in an earlier assistant message: send that message too",
            param=f"{field}.tool_use_id",
        )
    content = block.content or ""
    if isinstance(content, str):
        return _text_parts(content, f"{field}.content")
    return tuple(_part(inner, f"{field}.content[{i}]") for i, inner in enumerate(content))


def _text_parts(content: str | Sequence[SystemBlock], field: str) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (TextPart(no_nul(content, field)),)
    return tuple(
        TextPart(no_nul(block.text, f"{field}[{i}].text")) for i, block in enumerate(content)
    )


def _part(block: TextBlock | ImageBlock, field: str) -> Part:
    if isinstance(block, TextBlock):
        return TextPart(no_nul(block.text, f"{field}.text"))
    source = block.source
    if isinstance(source, UrlSource):
        return ImagePart(source.url, f"{field}.source.url")
    return ImagePart(f"data:{source.media_type};base64,{source.data}", f"{field}.source.data")


def _blocks(turn: AssistantTurn) -> Sequence[Any]:
    return () if isinstance(turn.content, str) else turn.content
