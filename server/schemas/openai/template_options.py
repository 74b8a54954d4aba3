"""Options of the chat template: fields that chat completions and /tokenize share.

Owns their types and rules. Knows nothing of templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from ...errors import BadRequestError
from ...prompts.chat_template import RESERVED, TemplateOptions
from ...prompts.conversation import Message
from ...prompts.placeholders import strings_in
from ...structured_output.json_depth import nests_deeper_than
from ..decoding import no_nul

MAX_DEPTH = 16
TemplateVariables = Annotated[dict[str, Any], msgspec.Meta(max_length=64)]

# What a variable that the server itself sets may be.
NOTHING: list[Any] = [None, False, 0, "", [], {}]

# What `template_options` checks, for the API's document; rules.CONTINUED has the rest in words.
TEMPLATE_RULES: tuple[dict[str, Any], ...] = (
    {
        "properties": {
            "chat_template_kwargs": {
                "properties": {name: {"enum": NOTHING} for name in sorted(RESERVED)}
            }
        }
    },
)


def template_options(
    messages: Sequence[Message],
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    variables: dict[str, Any] | None,
) -> TemplateOptions:
    """How the conversation is to be rendered. Raises BadRequestError that names the field."""
    if continue_final_message:
        if add_generation_prompt:
            raise BadRequestError(
                "continue_final_message and add_generation_prompt are both true: send one of them",
                param="continue_final_message",
            )
        _check_final(messages)
    # Clients write whole objects whose members are at their defaults.
    given = {
        name: value for name, value in (variables or {}).items() if value or name not in RESERVED
    }
    _check_variables(given)
    return TemplateOptions(
        add_generation_prompt=not continue_final_message and add_generation_prompt is not False,
        continue_final_message=bool(continue_final_message),
        variables=given,
    )


def _check_final(messages: Sequence[Message]) -> None:
    """Raises BadRequestError unless the last message can be continued."""
    last = messages[-1] if messages else None
    if last is None or last.role != "assistant" or last.tool_calls:
        raise BadRequestError(
            "continue_final_message needs an assistant message without tool_calls at the end of"
            " messages",
            param="continue_final_message",
        )


def _check_variables(variables: dict[str, Any]) -> None:
    field = "chat_template_kwargs"
    reserved = sorted(RESERVED & variables.keys())
    if reserved:
        raise BadRequestError(
            f"{field} contains {reserved[0]}, which the server sets itself: leave it out",
            param=f"{field}.{reserved[0]}",
        )
    if nests_deeper_than(MAX_DEPTH, variables):
        raise BadRequestError(f"{field} is nested more than {MAX_DEPTH} deep", param=field)
    for text in strings_in(variables):
        no_nul(text, field)
