"""The grammar of answers that are calls: what tool_choice required, or a named one, asks for.

Owns how a call is written where it must be one. The parser reads every text of these
grammars as calls. Knows nothing of how grammars are compiled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..prompts.conversation import Tool, ToolFormat
from .grammar_text import json_schema_grammar, lark_grammar, quoted, with_bounded_blanks
from .plain_schema import plain_schema

# So that a model which sees no end comes to one.
MAX_CALLS = 16


def calls_grammar(
    tools: Sequence[Tool], max_calls: int | None, tool_format: ToolFormat = "json"
) -> str:
    """One call or more to these tools, their arguments as the tools' schemas have them.

    max_calls: None for up to MAX_CALLS. Calls are function tags where the prompt asks
    for those, else JSON.
    Raises BadRequestError, naming tools, if the schemas are too long together.
    """
    is_tagged = tool_format == "function_tag"
    between = quoted("\n" if is_tagged else "; ")
    num_more = min(max_calls or MAX_CALLS, MAX_CALLS) - 1
    rules = [
        f"start: call ({between} call){{0,{num_more}}}" if num_more else "start: call",
        "call: " + " | ".join(f"call_{number}" for number in range(len(tools))),
    ]
    for number, tool in enumerate(tools):
        start, end = _around(tool, is_tagged)
        rules.append(f"call_{number}: {quoted(start)} arguments_{number} {quoted(end)}")
        rules.append(f"arguments_{number}: %json {_schema(tool)}")
    return lark_grammar("\n".join(rules), "tools")


def call_or_answer_grammar(tools: Sequence[Tool], answer: dict[str, Any], field: str) -> str:
    """One call to any of these tools in JSON, or JSON of the schema `answer`.

    A call's arguments are any object, as without a form. It is one schema: beginnings that calls
    and answers share stay open between them.
    Raises BadRequestError, naming `field`, if the schema is too long or too deep.
    """
    name = {"enum": [tool.name for tool in tools]}
    call = {
        "type": "object",
        "properties": {"name": name, "parameters": {"type": "object"}},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }
    schemas = {"answer": _moved(answer, "answer"), "call": call}
    choices = [{"$ref": f"#/$defs/{name}"} for name in schemas]
    return json_schema_grammar({"anyOf": choices, "$defs": schemas}, field)


def _moved(schema: Any, name: str) -> Any:
    """The schema with its references as they are where it stands in $defs under this name."""
    if isinstance(schema, list):
        return [_moved(one, name) for one in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, name) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = f"#/$defs/{name}{reference[1:]}"
    return moved


def _around(tool: Tool, is_tagged: bool) -> tuple[str, str]:
    """What stands before and behind a call's arguments."""
    if is_tagged:
        return f"<function={tool.name}>", "</function>"
    return f'{{"name": "{tool.name}", "parameters": ', "}"


def _schema(tool: Tool) -> str:
    plain, _ = plain_schema(tool.schema)
    return json.dumps(with_bounded_blanks(plain, f"the parameters of {tool.name}", "tools"))
