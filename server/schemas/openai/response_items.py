"""The input items of /v1/responses, and the conversation that they are.

Owns their names, ranges and spellings. Raises BadRequestError that names the item and the remedy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from ...errors import BadRequestError
from ...prompts.conversation import ImagePart, Message, Part, Role, TextPart, ToolCall
from ..allowed_values import Notes, choice_at
from ..decoding import no_nul
from ..tools import CallId, ToolName, arguments_of
from .chat_messages import MAX_PARTS, parts_of_text

ItemId = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class InputText(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="input_text"
):
    text: str


class InputImage(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="input_image"
):
    """detail "low" takes one tile; "auto" and "high" take what the checkpoint allows."""

    image_url: str
    detail: Literal["auto", "low", "high", "original"] | None = None
    file_id: None = None


class OutputText(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="output_text"
):
    """A text of an earlier answer; annotations, logprobs and parsed (of openai's parse()) are taken
    without effect.
    """

    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    parsed: Any = None


class OutputRefusal(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="refusal"
):
    refusal: str


ContentList = Annotated[
    list[InputText | InputImage | OutputText | OutputRefusal], msgspec.Meta(max_length=MAX_PARTS)
]
ResultList = Annotated[list[InputText | InputImage], msgspec.Meta(max_length=MAX_PARTS)]


class InputItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One item of the input. type: message if it is not given.

    message: role and content. function_call: call_id, name and arguments. function_call_output:
    call_id and output. item_reference: id. reasoning: another model's, left out of the prompt.
    caller, and parsed_arguments of openai's parse(), are taken without effect.
    """

    notes: ClassVar[Notes] = {
        "type": {
            "image_url": 'An image is {"type": "input_image", "image_url": ...}',
            "input_audio": "This model does not hear",
            "input_file": "Send the pages of a file as images",
            "text": "A text is input_text in input, and output_text in an answer",
        }
    }

    type: (
        Literal["message", "function_call", "function_call_output", "item_reference", "reasoning"]
        | None
    ) = None
    id: ItemId | None = None
    status: ItemStatus | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | ContentList | None = None
    phase: str | None = None
    call_id: CallId | None = None
    name: ToolName | None = None
    arguments: str | None = None
    output: str | ResultList | None = None
    summary: list[Any] | None = None
    encrypted_content: str | None = None
    caller: dict[str, Any] | None = None
    parsed_arguments: Any = None


def messages_of(items: Sequence[tuple[InputItem, str]]) -> Iterator[Message]:
    """Calls join the assistant's message before them; pictures of results follow as the user's."""
    turn: Message | None = None
    pictures: list[Part] = []
    call_ids: set[str] = set()
    for item, field in items:
        kind = item.type or "message"
        if pictures and kind != "function_call_output":
            yield Message("user", tuple(pictures))
            pictures = []
        if kind == "function_call":
            call = _call(item, field)
            call_ids.add(_needed(item.call_id, f"{field}.call_id"))
            before = turn or Message("assistant", ())
            turn = Message("assistant", before.parts, (*before.tool_calls, call))
            continue
        if turn is not None:
            yield turn
            turn = None
        if kind == "function_call_output":
            result = _result_parts(item, field, call_ids)
            yield Message("tool", tuple(part for part in result if isinstance(part, TextPart)))
            pictures += [part for part in result if isinstance(part, ImagePart)]
            continue
        if kind == "reasoning":
            continue
        if kind == "item_reference":
            raise BadRequestError(
                f"{field} is an item_reference: send the item itself, or use previous_response_id",
                param=field,
            )
        message = _message(item, field)
        if message.role == "assistant":
            turn = message
        else:
            yield message
    if turn is not None:
        yield turn
    if pictures:
        yield Message("user", tuple(pictures))


def _call(item: InputItem, field: str) -> ToolCall:
    name = _needed(item.name, f"{field}.name")
    return ToolCall(name, arguments_of(item.arguments or "{}", f"{field}.arguments"))


def _result_parts(item: InputItem, field: str, call_ids: set[str]) -> tuple[Part, ...]:
    call_id = _needed(item.call_id, f"{field}.call_id")
    if call_id not in call_ids:
        raise BadRequestError(
            f"{field}.call_id is {call_id[:64]!r}, which is the id of no earlier function_call:"
            " send that item too, or previous_response_id",
            param=f"{field}.call_id",
        )
    output = "" if item.output is None else item.output
    if isinstance(output, str):
        return (TextPart(no_nul(output, f"{field}.output")),)
    return tuple(_part(part, f"{field}.output[{i}]") for i, part in enumerate(output))


def _message(item: InputItem, field: str) -> Message:
    role: Role = {"developer": "system"}.get(item.role or "", item.role)  # type: ignore[assignment]
    if role is None:
        choice = choice_at(InputItem, {}, "role")
        assert choice is not None, "a role is one of a few"
        raise BadRequestError(f"{field}.role is required: {choice.remedy}", param=f"{field}.role")
    place = f"{field}.content"
    content = _needed(item.content, place)
    if isinstance(content, str):
        text = no_nul(content, place)
        return Message(role, parts_of_text(text, place) if role == "user" else (TextPart(text),))
    parts = tuple(_part(part, f"{place}[{i}]") for i, part in enumerate(content))
    if role != "user" and any(isinstance(part, ImagePart) for part in parts):
        raise BadRequestError(
            f"{place} of the role {item.role} has a picture: put it into a message of the user",
            param=place,
        )
    return Message(role, parts)


def _part(part: InputText | InputImage | OutputText | OutputRefusal, field: str) -> Part:
    if isinstance(part, InputImage):
        max_tiles = 1 if part.detail == "low" else None
        return ImagePart(part.image_url, f"{field}.image_url", max_tiles)
    if isinstance(part, OutputRefusal):
        return TextPart(no_nul(part.refusal, f"{field}.refusal"))
    return TextPart(no_nul(part.text, f"{field}.text"))


def _needed(value: Any, field: str) -> Any:
    if value is None:
        raise BadRequestError(f"{field} is required", param=field)
    return value
