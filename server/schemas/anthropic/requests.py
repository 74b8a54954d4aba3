"""POST /v1/messages: the request as Anthropic's clients write it.

Owns names, ranges and spellings of the request, and how it becomes a `GenerationRequest`. Knows
nothing of tokens or of the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from ...errors import BadRequestError
from ...generation.request import GenerationRequest, sampling_params
from ...prompts.conversation import ImagePart, Message, Part, TextPart, Tool, ToolCall
from ...structured_output.grammar_text import json_schema_grammar
from .. import rules
from ..allowed_values import ANY_VALUE, IMAGES_OF_USERS, Notes
from ..decoding import ModelName, no_nul
from ..foreign import FOREIGN_ELSEWHERE
from ..openai.chat_messages import bounded
from ..rules import all_of
from ..sampling import MaxTokens, Neutral, StopString, only_neutral, refuse_unless_neutral, stops_of
from ..structured import Form, answer_form
from ..tools import MAX_TOOLS, CallId, ToolName, check_choice, check_names, tool_of

MAX_BLOCKS = 2048
MAX_TURNS = 2048

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
    """A call in an earlier answer."""

    id: CallId
    name: ToolName
    input: dict[str, Any]
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


class ToolDefinition(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A tool of the client. Anthropic's own tools, which it runs itself, are not served."""

    notes: ClassVar[Notes] = {"type": {ANY_VALUE: "This server runs no tools"}}

    name: ToolName
    input_schema: dict[str, Any]
    description: Annotated[str, msgspec.Meta(max_length=65_536)] | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None


class _Choice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """disable_parallel_tool_use: the answer has one call at most."""


class AutoChoice(_Choice, frozen=True, tag="auto"):
    disable_parallel_tool_use: bool | None = None


class AnyChoice(_Choice, frozen=True, tag="any"):
    disable_parallel_tool_use: bool | None = None


class ToolChoiceByName(_Choice, frozen=True, tag="tool"):
    name: ToolName
    disable_parallel_tool_use: bool | None = None


class NoneChoice(_Choice, frozen=True, tag="none"):
    foreign: ClassVar[Mapping[str, tuple[Any, ...]]] = {"disable_parallel_tool_use": (False, True)}


class Metadata(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Taken without effect."""

    user_id: str | None = None


class JsonOutput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The answer is JSON that fits the schema."""

    # No tag: a tag may be absent where a field has one type only.
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """effort: taken without effect."""

    format: JsonOutput | None = None
    effort: str | None = None


# Unsupported fields: the values that they may have besides null.
REFUSED: dict[str, Neutral] = {
    "container": Neutral(({},)),
    "context_management": Neutral(({},)),
    "mcp_servers": Neutral(([],), "call the servers yourself and offer their tools as tools"),
    "service_tier": Neutral(("auto", "standard_only")),
    "speed": Neutral(("standard",)),
    "thinking": Neutral(({"type": "disabled"},), "this model does not reason. Leave it out"),
}
WITHOUT_EFFECT = frozenset(
    {
        "cache_control",
        "diagnostics",
        "inference_geo",
        "metadata",
        "user_profile_id",
        "workspace_id",
    }
)


class _Prompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a message and a count of its tokens share."""

    notes: ClassVar[Notes] = {"role": {"system": "Its text goes into the field system"}}
    foreign: ClassVar[Mapping[str, tuple[Any, ...]]] = FOREIGN_ELSEWHERE

    model: ModelName
    messages: Annotated[
        list[UserTurn | AssistantTurn], msgspec.Meta(min_length=1, max_length=MAX_TURNS)
    ]
    system: str | SystemBlocks | None = None
    tools: Annotated[list[ToolDefinition], msgspec.Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: AutoChoice | AnyChoice | ToolChoiceByName | NoneChoice | None = None
    output_config: OutputConfig | None = None
    # Taken at their neutral values only.
    container: str | dict[str, Any] | None = None
    context_management: dict[str, Any] | None = None
    mcp_servers: list[Any] | None = None
    speed: str | None = None
    thinking: dict[str, Any] | None = None
    # Taken without effect.
    cache_control: CacheControl | None = None
    user_profile_id: str | None = None
    workspace_id: str | None = None


class MessagesRequest(_Prompt, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body. Fields of `REFUSED` are taken at their neutral values only."""

    prose_rules: ClassVar[tuple[str, ...]] = (*rules.OF_CHATS, rules.RESULTS)
    schema_rules: ClassVar[dict[str, Any]] = all_of(only_neutral(REFUSED))

    max_tokens: MaxTokens
    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)] | None = None
    stop_sequences: Annotated[list[StopString], msgspec.Meta(max_length=16)] | None = None
    stream: bool | None = None
    service_tier: str | None = None
    # Taken without effect.
    diagnostics: dict[str, Any] | None = None
    inference_geo: str | None = None
    metadata: Metadata | None = None


class CountTokensRequest(_Prompt, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The same conversation without what an answer needs."""

    prose_rules: ClassVar[tuple[str, ...]] = (
        *rules.OF_CONVERSATIONS,
        rules.NAMED_TOOL,
        rules.CONTEXT,
    )


def messages_generation(body: MessagesRequest) -> GenerationRequest:
    """What is to be generated for this body.

    Raises BadRequestError that names the field and the remedy.
    """
    refuse_unless_neutral(body, REFUSED)
    tools = offered_tools(body)
    max_calls = 1 if getattr(body.tool_choice, "disable_parallel_tool_use", None) else None
    field = "tools[{}].input_schema"
    form = answer_form(_output_forms(body), tools, _choice_of(body), max_calls, schema_field=field)
    # top_p 0 keeps the most likely token alone: greedy.
    temperature = 0.0 if body.top_p == 0 else body.temperature
    return GenerationRequest(
        is_streamed=bool(body.stream),
        messages=conversation_of(body),
        tools=tools,
        grammar=form.grammar if form else None,
        grammar_field=form.field if form else "",
        grammar_parts=form.parts if form else (),
        ignored_fields=form.ignored if form else (),
        max_tool_calls=max_calls,
        sampling=sampling_params(temperature, body.top_p or None, body.top_k, None),
        max_tokens=body.max_tokens,
        stop=stops_of(body.stop_sequences),
    )


def _output_forms(body: MessagesRequest) -> list[Form]:
    if body.output_config is None or body.output_config.format is None:
        return []
    field = "output_config.format.schema"
    return [Form(json_schema_grammar(body.output_config.format.schema, field), field)]


def offered_tools(body: _Prompt) -> tuple[Tool, ...]:
    """The tools that the model may call. Raises BadRequestError."""
    tools = tuple(
        tool_of(tool.name, tool.description, tool.input_schema, f"tools[{i}].input_schema")
        for i, tool in enumerate(body.tools or ())
    )
    check_names(tools)
    check_choice(_choice_of(body), tools)
    return () if isinstance(body.tool_choice, NoneChoice) else tools


def _choice_of(body: _Prompt) -> str | None:
    """auto, required, or the name of a tool; None for no choice."""
    choice = body.tool_choice
    if isinstance(choice, ToolChoiceByName):
        return choice.name
    return "required" if isinstance(choice, AnyChoice) else None


def conversation_of(body: _Prompt) -> tuple[Message, ...]:
    """The conversation of a body. Raises BadRequestError that names the field."""
    return bounded(_messages(body))


def _messages(body: _Prompt) -> Iterator[Message]:
    if body.system:
        yield Message("system", _text_parts(body.system, "system"))
    call_ids: set[str] = set()
    for i, turn in enumerate(body.messages):
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
