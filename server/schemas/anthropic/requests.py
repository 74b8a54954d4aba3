"""POST /v1/messages: the request as Anthropic's clients write it.

Owns names, ranges and spellings of the request, and how it becomes a `GenerationRequest`.
`turns.py` reads its conversation. Knows nothing of tokens or of the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from ...generation.request import GenerationRequest, sampling_params
from ...prompts.chat_template import TemplateOptions
from ...prompts.conversation import Message, Tool
from .. import rules
from ..allowed_values import ANY_VALUE, Notes
from ..decoding import ModelName
from ..foreign import FOREIGN_ELSEWHERE
from ..openai.chat_messages import bounded
from ..openai.template_options import template_options
from ..rules import all_of
from ..sampling import MaxTokens, Neutral, StopString, only_neutral, refuse_unless_neutral, stops_of
from ..structured import Form, answer_form, schema_form
from ..tools import MAX_TOOLS, ToolName, check_choice, check_names, tool_of
from .turns import AssistantTurn, CacheControl, SystemBlocks, UserTurn, messages_of

MAX_TURNS = 2048


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
    messages = conversation_of(body)
    return GenerationRequest(
        is_streamed=bool(body.stream),
        messages=messages,
        template_options=template_options_of(messages),
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
    return [schema_form(body.output_config.format.schema, "output_config.format.schema")]


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
    return bounded(messages_of(body.system, body.messages))


def template_options_of(messages: Sequence[Message]) -> TemplateOptions:
    """How the conversation is rendered: an assistant's last message with text is continued."""
    last = messages[-1]
    is_continued = last.role == "assistant" and not last.tool_calls and bool(last.text.strip())
    return template_options(messages, None, is_continued, None)
