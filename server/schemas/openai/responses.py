"""POST /v1/responses: the request as OpenAI's clients write it.

Owns names, ranges and spellings of the request, and how it becomes a `GenerationRequest`.
`response_items.py` reads its input. Knows nothing of stored responses, tokens or answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from ...errors import BadRequestError
from ...generation.request import GenerationRequest, sampling_params
from ...prompts.conversation import Message, TextPart, Tool
from ...structured_output.grammar_text import json_object_grammar
from .. import rules
from ..allowed_values import ANY_VALUE, Notes
from ..decoding import ModelName, no_nul
from ..foreign import FOREIGN_ELSEWHERE
from ..rules import all_of
from ..sampling import MaxTokens, Neutral, NumTop, only_neutral, refuse_unless_neutral
from ..structured import Form, answer_form, schema_form
from ..tools import (
    MAX_TOOLS,
    ToolName,
    check_choice,
    check_names,
    tool_of,
)
from .chat_messages import bounded
from .response_items import InputItem, messages_of

MAX_ITEMS = 2048
ResponseId = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]


class FunctionToolOfResponse(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A function of the client. OpenAI's own tools, which it runs itself, are not served."""

    notes: ClassVar[Notes] = {"type": {ANY_VALUE: "This server runs no tools"}}

    name: ToolName
    type: Literal["function"]
    description: Annotated[str, msgspec.Meta(max_length=65_536)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Named(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: ToolName
    type: Literal["function"] = "function"


class FunctionOfChoice(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="function"
):
    name: ToolName


class AllowedOfChoice(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="allowed_tools"
):
    mode: Literal["auto", "required"]
    tools: Annotated[list[_Named], msgspec.Meta(min_length=1, max_length=MAX_TOOLS)]


class TextOfResponse(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="text"):
    pass


class JsonObjectOfResponse(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="json_object"
):
    pass


class JsonSchemaOfResponse(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="json_schema", kw_only=True
):
    """The schema is obeyed whether `strict` or not; name and description have no effect."""

    schema: dict[str, Any]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class TextSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """format: what form the answer must have. verbosity: taken at medium only."""

    format: TextOfResponse | JsonObjectOfResponse | JsonSchemaOfResponse | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """This model does not reason: effort is none."""

    notes: ClassVar[Notes] = {"effort": {ANY_VALUE: "This model does not reason"}}

    effort: Literal["none"] | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponseStreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """include_obfuscation: taken without effect."""

    include_obfuscation: bool | None = None


# Unsupported fields: the values that they may have besides null.
REFUSED: dict[str, Neutral] = {
    "background": Neutral((False,), "send the request without it and read the answer"),
    "conversation": Neutral(({},), "use previous_response_id"),
    "prompt": Neutral(({},), "send its text as instructions and input"),
    "prompt_cache_options": Neutral(({"mode": "implicit", "ttl": "30m"},)),
    "prompt_cache_retention": Neutral(("in_memory",)),
    "service_tier": Neutral(("auto", "default")),
    "truncation": Neutral(("disabled",), "shorten the input yourself"),
}
WITHOUT_EFFECT = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "user"})
_SCHEMA_FIELD = "tools[{}].parameters"
LOGPROBS = "message.output_text.logprobs"


class ResponsesRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body. Fields of `REFUSED` are taken at their neutral values only.

    store: keep the response for previous_response_id; true unless the server keeps none. include:
    message.output_text.logprobs adds log-probabilities; other values have no effect.
    """

    prose_rules: ClassVar[tuple[str, ...]] = (
        *rules.OF_CHATS,
        rules.RESULTS,
        rules.ITEMS,
        rules.STORED,
    )
    schema_rules: ClassVar[dict[str, Any]] = all_of(only_neutral(REFUSED))

    foreign: ClassVar[Mapping[str, tuple[Any, ...]]] = FOREIGN_ELSEWHERE

    model: ModelName
    input: str | Annotated[list[InputItem], msgspec.Meta(min_length=1, max_length=MAX_ITEMS)]
    instructions: str | None = None
    previous_response_id: ResponseId | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: MaxTokens | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] | None = None
    top_logprobs: NumTop | None = None
    include: Annotated[list[str], msgspec.Meta(max_length=64)] | None = None
    text: TextSettings | None = None
    reasoning: Reasoning | None = None
    tools: Annotated[list[FunctionToolOfResponse], msgspec.Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionOfChoice | AllowedOfChoice | None = (
        None
    )
    parallel_tool_calls: bool | None = None
    max_tool_calls: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)] | None = None
    # Taken at their neutral values only.
    background: bool | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None
    truncation: str | None = None
    # Taken without effect; metadata comes back in the answer.
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None

    @property
    def num_logprobs(self) -> int | None:
        """How many candidates a token has, None if log-probabilities are not requested."""
        return self.top_logprobs or 0 if LOGPROBS in (self.include or ()) else self.top_logprobs

    @property
    def items(self) -> list[InputItem]:
        """The input as items: a text is one message of the user."""
        if isinstance(self.input, str):
            return [InputItem(role="user", content=self.input)]
        return self.input


def responses_generation(
    body: ResponsesRequest, earlier: Sequence[InputItem] = ()
) -> GenerationRequest:
    """What is to be generated for this body. earlier: the items before its own input.

    Raises BadRequestError that names the field and the remedy.
    """
    refuse_unless_neutral(body, REFUSED)
    tools = _offered_tools(body)
    max_calls = 1 if body.parallel_tool_calls is False else body.max_tool_calls
    choice = _choice_of(body)
    form = answer_form(_text_forms(body.text), tools, choice, max_calls, schema_field=_SCHEMA_FIELD)
    # top_p 0 keeps the most likely token alone: greedy.
    temperature = 0.0 if body.top_p == 0 else body.temperature
    sampling = sampling_params(temperature, body.top_p or None, None, None)
    return GenerationRequest(
        is_streamed=bool(body.stream),
        messages=_conversation_of(body, earlier),
        tools=tools,
        grammar=form.grammar if form else None,
        grammar_field=form.field if form else "",
        grammar_parts=form.parts if form else (),
        ignored_fields=form.ignored if form else (),
        max_tool_calls=max_calls,
        sampling=msgspec.structs.replace(sampling, num_logprobs=body.num_logprobs),
        max_tokens=body.max_output_tokens,
        max_tokens_field="max_output_tokens",
    )


def _text_forms(text: TextSettings | None) -> list[Form]:
    wanted = text.format if text is not None else None
    if isinstance(wanted, JsonObjectOfResponse):
        return [Form(json_object_grammar(), "text.format")]
    if isinstance(wanted, JsonSchemaOfResponse):
        field = "text.format.schema"
        return [schema_form(wanted.schema, field)]
    return []


def _offered_tools(body: ResponsesRequest) -> tuple[Tool, ...]:
    """The tools that the model may call. Raises BadRequestError."""
    tools = tuple(
        tool_of(tool.name, tool.description, tool.parameters, f"tools[{i}].parameters")
        for i, tool in enumerate(body.tools or ())
    )
    check_names(tools)
    if isinstance(body.tool_choice, AllowedOfChoice):
        tools = _allowed(tools, body.tool_choice)
    check_choice(_choice_of(body), tools)
    return () if body.tool_choice == "none" else tools


def _allowed(tools: tuple[Tool, ...], choice: AllowedOfChoice) -> tuple[Tool, ...]:
    offered = {tool.name for tool in tools}
    for index, tool in enumerate(choice.tools):
        if tool.name not in offered:
            field = f"tool_choice.tools[{index}]"
            raise BadRequestError(
                f"{field} is {tool.name!r}, which is none of tools: offer it", param=field
            )
    allowed = {tool.name for tool in choice.tools}
    return tuple(tool for tool in tools if tool.name in allowed)


def _choice_of(body: ResponsesRequest) -> str | None:
    """auto, none, required, or the name of a tool."""
    choice = body.tool_choice
    if isinstance(choice, FunctionOfChoice):
        return choice.name
    return choice.mode if isinstance(choice, AllowedOfChoice) else choice


def _conversation_of(body: ResponsesRequest, earlier: Sequence[InputItem]) -> tuple[Message, ...]:
    messages: list[Message] = []
    if body.instructions:
        messages.append(Message("system", (TextPart(no_nul(body.instructions, "instructions")),)))
    places = [f"previous_response_id.items[{i}]" for i in range(len(earlier))]
    places += ["input" if isinstance(body.input, str) else f"input[{i}]"
               for i in range(len(body.items))]  # fmt: skip
    items = [*earlier, *body.items]
    messages += messages_of(list(zip(items, places, strict=True)))
    if not messages:
        raise BadRequestError("input has no message: send at least one", param="input")
    return bounded(messages)
