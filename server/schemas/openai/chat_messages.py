"""Conversations as OpenAI's clients write them: roles, contents and parts.

Owns their names, bounds and spellings, and how they become a conversation. Knows nothing of
sampling, of tokens or of answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from ...errors import BadRequestError
from ...prompts.conversation import ImagePart, Message, Part, Role, TextPart
from ..allowed_values import IMAGES_OF_USERS, Notes
from ..decoding import no_nul
from ..tools import CallId, CallList, calls_of

Name = Annotated[str, msgspec.Meta(max_length=256)]

MAX_PARTS = 2048

# Only data URLs: a link inside a text is never fetched.
_IMG_TAG = re.compile(
    r"""<img\s++src=(?P<quote>["'])(?P<url>data:image/[^"']*+)(?P=quote)\s*+/?>"""
)


class ImageUrl(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """detail "low" takes one tile; "auto" and "high" take what the checkpoint allows."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class _PartOfContent(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What all parts share, without effect: prompts are cached anyway."""

    cache_control: dict[str, Any] | None = None


class TextContent(_PartOfContent, frozen=True, tag_field="type", tag="text", kw_only=True):
    """annotations: as an answer had them, without effect."""

    text: str
    annotations: list[Any] | None = None


class OnlyText(_PartOfContent, frozen=True, kw_only=True):
    """A part where only texts are accepted, so its type adds nothing."""

    text: str
    type: Literal["text"] = "text"


class ImageContent(_PartOfContent, frozen=True, tag_field="type", tag="image_url", kw_only=True):
    image_url: ImageUrl | str


class RefusalContent(_PartOfContent, frozen=True, tag_field="type", tag="refusal", kw_only=True):
    """Another model's refusal: text of the conversation like any."""

    refusal: str


class ThinkingContent(_PartOfContent, frozen=True, tag_field="type", tag="thinking", kw_only=True):
    """Another model's thinking, echoed: it is left out of the prompt."""

    thinking: str
    signature: str | None = None


class RedactedThinkingContent(
    _PartOfContent, frozen=True, tag_field="type", tag="redacted_thinking", kw_only=True
):
    """Another model's hidden thinking, echoed: it is left out of the prompt."""

    data: str


TextList = Annotated[list[OnlyText], msgspec.Meta(max_length=MAX_PARTS)]
AnswerPart = TextContent | RefusalContent | ThinkingContent | RedactedThinkingContent
AnswerList = Annotated[list[AnswerPart], msgspec.Meta(max_length=MAX_PARTS)]
PartList = Annotated[list[TextContent | ImageContent], msgspec.Meta(max_length=MAX_PARTS)]


class _Turn(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="role", kw_only=True
):
    """What all roles share, without effect."""

    notes: ClassVar[Notes] = IMAGES_OF_USERS

    name: Name | None = None
    type: str | None = None
    cache_control: dict[str, Any] | None = None


class SystemMessage(_Turn, frozen=True, tag="system", kw_only=True):
    content: str | TextList


class DeveloperMessage(_Turn, frozen=True, tag="developer", kw_only=True):
    """The newer name of a system message."""

    content: str | TextList


class UserMessage(_Turn, frozen=True, tag="user", kw_only=True):
    notes: ClassVar[Notes] = {
        "type": {
            "file": "Send the pages of a file as images",
            "image": 'An image is {"type": "image_url", "image_url": {"url": ...}}',
            "input_audio": "This model does not hear",
            "input_image": "That is a part of /v1/responses",
            "input_text": "That is a part of /v1/responses",
            "video_url": "Send frames of the video as images",
        }
    }

    content: str | PartList


class AssistantMessage(_Turn, frozen=True, tag="assistant", kw_only=True):
    """An earlier answer, with the fields that SDKs add to it, which have no effect.

    content is null beside tool_calls or a refusal, or where an answer has no text. parsed: openai's
    parse(). reasoning, reasoning_content, thinking_blocks, provider_specific_fields: LiteLLM and
    vLLM. invalid_tool_calls: LangChain.
    """

    content: str | AnswerList | None = None
    refusal: str | None = None
    audio: None = None
    annotations: list[Any] | None = None
    function_call: None = None
    tool_calls: CallList | None = None
    invalid_tool_calls: list[Any] | None = None
    parsed: Any = None
    provider_specific_fields: dict[str, Any] | None = None
    reasoning: Any = None
    reasoning_content: str | None = None
    thinking_blocks: list[Any] | None = None


class ToolMessage(_Turn, frozen=True, tag="tool", kw_only=True):
    """The result of one call of an earlier answer."""

    content: str | TextList
    tool_call_id: CallId


AnyMessage = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage
MessageList = Annotated[list[AnyMessage], msgspec.Meta(min_length=1, max_length=2048)]


def conversation_of(turns: Sequence[AnyMessage]) -> tuple[Message, ...]:
    """The conversation that a body's messages are. Raises BadRequestError that names the field."""
    messages = bounded(_message(turn, f"messages[{i}]") for i, turn in enumerate(turns))
    _check_results(turns)
    return messages


def bounded(messages: Iterable[Message]) -> tuple[Message, ...]:
    """All of the messages. Raises BadRequestError at the first that is one image too many.

    Far over what a server takes: only so that a body of nothing but images is not read on.
    """
    taken: list[Message] = []
    num_images = 0
    for message in messages:
        num_images += len(message.images)
        if num_images > MAX_PARTS:
            raise BadRequestError(
                f"the messages have over {MAX_PARTS:,} images: send fewer", param="messages"
            )
        taken.append(message)
    return tuple(taken)


def _check_results(turns: Sequence[AnyMessage]) -> None:
    """Raises BadRequestError at a tool message that answers no call of an earlier answer."""
    ids: set[str] = set()
    for i, turn in enumerate(turns):
        if isinstance(turn, AssistantMessage):
            ids.update(call.id for call in turn.tool_calls or ())
        elif isinstance(turn, ToolMessage) and turn.tool_call_id not in ids:
            raise BadRequestError(
                f"messages[{i}].tool_call_id is {turn.tool_call_id[:64]!r}, which is the id of no"
                " call in an earlier assistant message: send that message too",
                param=f"messages[{i}].tool_call_id",
            )


def _message(turn: AnyMessage, field: str) -> Message:
    parts = _parts(turn, f"{field}.content")
    if not isinstance(turn, AssistantMessage):
        return Message(_role(turn), parts)
    if turn.refusal:
        parts += (TextPart(no_nul(turn.refusal, f"{field}.refusal")),)
    return Message("assistant", parts, calls_of(turn.tool_calls, f"{field}.tool_calls"))


def _role(turn: AnyMessage) -> Role:
    if isinstance(turn, UserMessage):
        return "user"
    return "tool" if isinstance(turn, ToolMessage) else "system"


def _parts(turn: AnyMessage, field: str) -> tuple[Part, ...]:
    if turn.content is None:
        return ()
    if isinstance(turn.content, str):
        text = no_nul(turn.content, field)
        return parts_of_text(text, field) if isinstance(turn, UserMessage) else (TextPart(text),)
    parts = [
        part_of(part, f"{field}[{i}]")
        for i, part in enumerate(turn.content)
        if not isinstance(part, ThinkingContent | RedactedThinkingContent)
    ]
    return tuple(parts)


def part_of(part: OnlyText | TextContent | RefusalContent | ImageContent, field: str) -> Part:
    """The part of a conversation that a part of a content is. Raises BadRequestError."""
    if isinstance(part, RefusalContent):
        return TextPart(no_nul(part.refusal, f"{field}.refusal"))
    if not isinstance(part, ImageContent):
        return TextPart(no_nul(part.text, f"{field}.text"))
    if isinstance(part.image_url, str):
        return ImagePart(part.image_url, f"{field}.image_url")
    max_tiles = 1 if part.image_url.detail == "low" else None
    return ImagePart(part.image_url.url, f"{field}.image_url.url", max_tiles)


def parts_of_text(text: str, field: str) -> tuple[Part, ...]:
    """A string content in parts: `<img src="data:image/...">` in it is an image.

    Raises BadRequestError where it has more parts than a list of them may have.
    """
    parts: list[Part] = []
    start = 0
    for tag in _IMG_TAG.finditer(text):
        if len(parts) >= MAX_PARTS:
            raise BadRequestError(f"{field} has over {MAX_PARTS:,} parts: send fewer", param=field)
        parts += [TextPart(text[start : tag.start()]), ImagePart(tag["url"], field)]
        start = tag.end()
    parts.append(TextPart(text[start:]))
    return tuple(part for part in parts if isinstance(part, ImagePart) or part.text)
