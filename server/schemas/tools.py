"""Tools, calls and results as OpenAI's clients write them.

Owns their names, bounds and spellings, and how they become a conversation's.
Knows nothing of prompts or of answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from ..errors import BadRequestError
from ..prompts.conversation import Tool, ToolCall
from ..structured_output.json_depth import nests_deeper_than
from .decoding import no_nul

MAX_TOOLS = 128
MAX_PARAMETERS_BYTES = 65_536
MAX_DEPTH = 64

RESERVED = ("auto", "none", "required")

ToolName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z")]
CallId = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class FunctionDefinition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """strict is kept by tool_choice required or a named one, which obey the schema in any case."""

    name: ToolName
    description: Annotated[str, msgspec.Meta(max_length=65_536)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    function: FunctionDefinition
    type: Literal["function"] = "function"


class FunctionName(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: ToolName


class NamedTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    function: FunctionName
    type: Literal["function"] = "function"


class NamedChoice(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="function"
):
    """The one tool that the model must call."""

    function: FunctionName


class AllowedTools(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Some of the tools, of which the model may, or by mode required must, call one."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], msgspec.Meta(min_length=1, max_length=MAX_TOOLS)]


class AllowedChoice(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="allowed_tools"
):
    allowed_tools: AllowedTools


class CalledFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """arguments: text, as the answer had it. parsed_arguments: openai's parse(), without effect."""

    name: ToolName
    arguments: str
    parsed_arguments: Any = None


class CallOfTurn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call of an earlier answer. Clients also echo index, by which streams count.

    provider_specific_fields, cache_control: LiteLLM's, without effect.
    """

    id: CallId
    function: CalledFunction
    type: Literal["function"] = "function"
    index: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None = None
    provider_specific_fields: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None


ToolList = Annotated[list[FunctionTool], msgspec.Meta(max_length=MAX_TOOLS)]
CallList = Annotated[list[CallOfTurn], msgspec.Meta(max_length=MAX_TOOLS)]
ToolChoice = Literal["none", "auto", "required"] | NamedChoice | AllowedChoice


def tools_of(definitions: Sequence[FunctionTool] | None) -> tuple[Tool, ...]:
    """The tools that a request describes. Raises BadRequestError."""
    tools = tuple(
        tool_of(
            one.function.name,
            one.function.description,
            one.function.parameters,
            f"tools[{i}].function.parameters",
        )
        for i, one in enumerate(definitions or ())
    )
    check_names(tools)
    return tools


def tool_of(
    name: str, description: str | None, parameters: dict[str, Any] | None, field: str
) -> Tool:
    """One tool, its parameters, which stand in `field`, checked to be a schema of an object."""
    if parameters is not None:
        check_schema(parameters, field)
    return Tool(name, description, parameters)


def check_schema(parameters: dict[str, Any], field: str) -> None:
    """Raises BadRequestError if the schema is no object's, too long or too deep."""
    kind = parameters.get("type") or "object"
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise BadRequestError(f'{field}.type is not "object": arguments have names', param=field)
    _check_depth(parameters, field)
    num_bytes = len(msgspec.json.encode(parameters))
    if num_bytes > MAX_PARAMETERS_BYTES:
        raise BadRequestError(
            f"{field} has {num_bytes:,} bytes; the limit is {MAX_PARAMETERS_BYTES:,}: shorten it",
            param=field,
        )


def check_names(tools: Sequence[Tool]) -> None:
    """Raises BadRequestError if two tools share a name, or one has a name of tool_choice's."""
    names = [tool.name for tool in tools]
    for index, name in enumerate(names):
        if name in RESERVED:
            raise BadRequestError(
                f"tools[{index}] is named {name!r}, by which tool_choice means another thing:"
                " rename it",
                param="tools",
            )
        if name in names[:index]:
            raise BadRequestError(
                f"tools[{index}] is a second tool named {name!r}: rename one", param="tools"
            )


def calls_of(calls: Sequence[CallOfTurn] | None, field: str) -> tuple[ToolCall, ...]:
    """The calls of an earlier answer. Raises BadRequestError if arguments are too deep."""
    return tuple(
        ToolCall(
            call.function.name,
            arguments_of(call.function.arguments, f"{field}[{i}].function.arguments"),
        )
        for i, call in enumerate(calls or ())
    )


def arguments_of(text: str, field: str) -> dict[str, Any] | str:
    """The arguments of a call; text that is no JSON object stays as the model wrote it.

    A model may write anything, and max_tokens may cut it. Raises BadRequestError if the arguments
    are nested too deeply.
    """
    try:
        # No arguments at all: some clients write them so.
        arguments = msgspec.json.decode(text or "{}")
    except RecursionError:
        raise _too_deep(field) from None
    except msgspec.MsgspecError:
        return no_nul(text, field)
    _check_depth(arguments, field)
    return arguments if isinstance(arguments, dict) else text


def choice_of(choice: ToolChoice | None) -> str | None:
    """auto, none, required, or the name of a tool."""
    if isinstance(choice, AllowedChoice):
        return choice.allowed_tools.mode
    return choice.function.name if isinstance(choice, NamedChoice) else choice


def allowed_of(choice: ToolChoice | None, tools: tuple[Tool, ...]) -> tuple[Tool, ...]:
    """The tools that the choice leaves. Raises BadRequestError if it names another one."""
    if not isinstance(choice, AllowedChoice):
        return tools
    offered = {tool.name for tool in tools}
    allowed = [one.function.name for one in choice.allowed_tools.tools]
    for index, name in enumerate(allowed):
        if name not in offered:
            field = f"tool_choice.allowed_tools.tools[{index}]"
            raise BadRequestError(
                f"{field} is {name!r}, which is none of tools: offer it", param=field
            )
    return tuple(tool for tool in tools if tool.name in allowed)


def check_choice(choice: str | None, tools: Sequence[Tool]) -> None:
    """Raises BadRequestError if the tool_choice needs a tool that is not there.

    choice: auto, none, required, or the name of a tool.
    """
    if choice in (None, "auto", "none"):
        return
    if not tools:
        raise BadRequestError("tool_choice needs tools: send some", param="tool_choice")
    if choice != "required" and choice not in [tool.name for tool in tools]:
        raise BadRequestError(
            f"tool_choice names {choice!r}, which is none of tools: offer it", param="tool_choice"
        )


def _check_depth(value: Any, field: str) -> None:
    if nests_deeper_than(MAX_DEPTH, value):
        raise _too_deep(field)


def _too_deep(field: str) -> BadRequestError:
    return BadRequestError(
        f"{field} is nested more than {MAX_DEPTH} deep: flatten it, or define parts of a schema"
        " in $defs",
        param=field,
    )
