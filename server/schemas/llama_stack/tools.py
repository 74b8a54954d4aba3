"""Tools, calls and results as Llama Stack's clients write them.

Owns their names and bounds, and how they become a conversation's. Knows nothing
of prompts or of answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from ...errors import BadRequestError
from ...prompts.conversation import Tool, ToolCall, ToolFormat
from ..tools import MAX_TOOLS, ToolName, arguments_of, check_choice, check_names, check_schema

# Python's names of types, which Llama Stack's clients write, as JSON schemas have them.
_TYPES = {
    "str": "string", "int": "integer", "float": "number", "bool": "boolean",
    "list": "array", "tuple": "array", "dict": "object",
}  # fmt: skip
_SCHEMA_TYPES = {"string", "integer", "number", "boolean", "array", "object", "null"}


class StackParameter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """param_type: a type of JSON schema's, or of Python's; any other leaves the type open."""

    param_type: Annotated[str, msgspec.Meta(max_length=256)]
    description: str | None = None
    required: bool | None = None
    default: Any = None
    title: str | None = None
    items: dict[str, Any] | None = None


class StackTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tool_name: ToolName
    description: Annotated[str, msgspec.Meta(max_length=65_536)] | None = None
    parameters: dict[str, StackParameter] | None = None


class StackToolCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call of an earlier answer. Newer clients send its arguments as text too."""

    tool_name: ToolName
    arguments: dict[str, Any] | str
    call_id: str | None = None
    arguments_json: str | None = None


class ToolConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The newer place of tool_choice and tool_prompt_format; null leaves the older one's."""

    tool_choice: str | None = None
    tool_prompt_format: ToolFormat | None = None
    system_message_behavior: Literal["append"] | None = None


StackTools = Annotated[list[StackTool], msgspec.Meta(max_length=MAX_TOOLS)]
StackCalls = Annotated[list[StackToolCall], msgspec.Meta(max_length=MAX_TOOLS)]


def stack_tools(definitions: Sequence[StackTool] | None) -> tuple[Tool, ...]:
    """The tools that a request describes. Raises BadRequestError."""
    tools = tuple(_tool(one, f"tools[{i}].parameters") for i, one in enumerate(definitions or ()))
    check_names(tools)
    return tools


def offered_tools(tools: tuple[Tool, ...], choice: str | None) -> tuple[Tool, ...]:
    """The tools in the prompt: none if the model may not call any."""
    check_choice(choice, tools)
    return () if choice == "none" else tools


def stack_calls(calls: Sequence[StackToolCall] | None, field: str) -> tuple[ToolCall, ...]:
    """The calls of an earlier answer. Raises BadRequestError if arguments are too deep."""
    return tuple(
        ToolCall(call.tool_name, _arguments(call, f"{field}[{i}].arguments"))
        for i, call in enumerate(calls or ())
    )


def one_setting(older: str | None, newer: str | None, field: str, neutral: str) -> str | None:
    """What stands in tool_config or, older, beside it. Raises BadRequestError if both differ."""
    if newer is not None and older not in (None, neutral, newer):
        raise BadRequestError(
            f"{field} is {older[:64]!r} and tool_config.{field} is {newer[:64]!r}: send one",
            param=f"tool_config.{field}",
        )
    return older if newer is None else newer


def _tool(definition: StackTool, field: str) -> Tool:
    if definition.parameters is None:
        return Tool(definition.tool_name, definition.description)
    parameters = definition.parameters
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _schema(one) for name, one in parameters.items()},
        # A parameter is required unless its definition sets otherwise.
        "required": [name for name, one in parameters.items() if one.required is not False],
        "additionalProperties": False,
    }
    check_schema(schema, field)
    return Tool(definition.tool_name, definition.description, schema)


def _schema(parameter: StackParameter) -> dict[str, Any]:
    type_name = parameter.param_type.partition("[")[0]
    type_name = _TYPES.get(type_name, type_name)
    schema: dict[str, Any] = {"type": type_name} if type_name in _SCHEMA_TYPES else {}
    for key in ("title", "description", "default", "items"):
        value = getattr(parameter, key)
        if value is not None:
            schema[key] = value
    return schema


def _arguments(call: StackToolCall, field: str) -> dict[str, Any] | str:
    arguments = call.arguments
    # The same check of depth for both spellings.
    text = arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()
    return arguments_of(text, field)
