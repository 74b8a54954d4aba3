"""Renders a conversation in Meta's own format, if a chat template cannot.

Owns the headers, and the three formats of tools and calls that Llama 3 was trained on. Knows
nothing of token ids or templates.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .chat_template import IMAGE
from .conversation import ImagePart, Message, TextPart, Tool, ToolCall, ToolFormat
from .placeholders import RenderedPiece
from .templates.sources import BEGIN_OF_TEXT

# The words of the published chat template; the missing space is its own.
JSON_TASK = (
    "Given the following functions, please respond with a JSON for a function call with its"
    " proper arguments that best answers the given prompt.\n\n"
    'Respond in the format {"name": function name, "parameters": dictionary of argument name'
    " and its value}.Do not use variables.\n\n"
)
TAG_TASK = (
    "To call a function, reply with nothing but this:\n\n"
    '<function=example_function_name>{"example_name": "example_value"}</function>\n\n'
)
LIST_TASK = (
    "To call functions, reply with nothing but this:\n\n"
    "[func_name1(params_name1=params_value1, params_name2=params_value2...),"
    " func_name2(params)]\n\n"
)
LIST_HEAD = "You have access to the following functions:\n\n"


def render_as_meta(
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    tool_format: ToolFormat = "json",
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> list[RenderedPiece]:
    """The prompt in Meta's ChatFormat: no preamble, no date, every role with images.

    Tools in JSON go to the start of the first user message, as in the published template; tools in
    other formats to the start of the system message. A missing message is added.
    continue_final_message: the prompt ends within the last message.
    """
    role = "user" if tool_format == "json" else "system"
    place = _place_of_tools(messages, role) if tools else None
    pieces = [RenderedPiece(BEGIN_OF_TEXT, is_template=True)]
    for number, message in enumerate(messages):
        if number == place and message.role != role:
            pieces += [_header(role), *_tools(tools, tool_format), _turn_end()]
        pieces.append(_header("ipython" if message.role == "tool" else message.role))
        if number == place and message.role == role:
            pieces += _tools(tools, tool_format)
        pieces.extend(_meta_part(part) for part in message.parts)
        pieces += _calls(message, tool_format)
        pieces.append(_turn_end())
    if continue_final_message:
        return pieces[:-1]
    if place == len(messages):
        pieces += [_header(role), *_tools(tools, tool_format), _turn_end()]
    return [*pieces, _header("assistant")] if add_generation_prompt else pieces


def with_tools_in_system(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """The same messages, with the tools in JSON at the start of the system message.

    A missing system message is added. For conversations with images: the published template has
    no place for tools beside images, and an image stays next to its question.
    """
    is_first = bool(messages) and messages[0].role == "system"
    system = messages[0] if is_first else Message("system", ())
    listed = TextPart(_tools_text(tools) + system.text.strip())
    return [Message("system", (listed, *system.images)), *messages[is_first:]]


def _tools_text(tools: Sequence[Tool]) -> str:
    return JSON_TASK + "".join(f"{_json(tool.definition, indent=4)}\n\n" for tool in tools)


def _place_of_tools(messages: Sequence[Message], role: str) -> int:
    """The index of the message with the tools, or where such a message is added."""
    roles = [message.role for message in messages]
    if role == "system":
        return 0
    others = (number for number, role in enumerate(roles) if role != "system")
    return roles.index("user") if "user" in roles else next(others, len(roles))


def _header(role: str) -> RenderedPiece:
    return RenderedPiece(f"<|start_header_id|>{role}<|end_header_id|>\n\n", is_template=True)


def _turn_end() -> RenderedPiece:
    return RenderedPiece("<|eot_id|>", is_template=True)


def _meta_part(part: TextPart | ImagePart) -> RenderedPiece:
    if isinstance(part, ImagePart):
        return RenderedPiece(IMAGE, is_template=True)
    return RenderedPiece(part.text.strip(), is_template=False)


def _tools(tools: Sequence[Tool], tool_format: ToolFormat) -> list[RenderedPiece]:
    """The prompt's list of tools. The client wrote them, so they are text, not template."""
    if tool_format == "json":
        return [_text(_tools_text(tools))]
    functions = [tool.definition["function"] for tool in tools]
    if tool_format == "function_tag":
        listed = "".join(f"{_json(function)}\n\n" for function in functions)
        return [_text(LIST_HEAD + listed + TAG_TASK)]
    return [_text(f"{LIST_HEAD}{_json(functions)}\n\n{LIST_TASK}")]


def _calls(message: Message, tool_format: ToolFormat) -> list[RenderedPiece]:
    if not message.tool_calls:
        return []
    if tool_format == "json":
        calls = "; ".join(_json_call(call) for call in message.tool_calls)
    elif tool_format == "function_tag":
        calls = "\n".join(
            f"<function={call.name}>{call.arguments_text}</function>" for call in message.tool_calls
        )
    else:
        calls = f"[{', '.join(_python_call(call) for call in message.tool_calls)}]"
    return [_text(f"\n{calls}" if message.text.strip() else calls)]


def _json_call(call: ToolCall) -> str:
    return f'{{"name": "{call.name}", "parameters": {call.arguments_text}}}'


def _python_call(call: ToolCall) -> str:
    if isinstance(call.arguments, str):
        return f"{call.name}({call.arguments})"
    arguments = (f"{key}={python_literal(value)}" for key, value in call.arguments.items())
    return f"{call.name}({', '.join(arguments)})"


def python_literal(value: Any) -> str:
    """A JSON value as Python writes it; strings keep JSON's quotes."""
    if isinstance(value, dict):
        pairs = (f"{python_literal(key)}: {python_literal(one)}" for key, one in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(python_literal, value))}]"
    return repr(value) if value is None or isinstance(value, bool) else _json(value)


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _text(text: str) -> RenderedPiece:
    return RenderedPiece(text, is_template=False)
