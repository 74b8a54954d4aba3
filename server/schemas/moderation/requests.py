"""The body of POST /v1/moderations, and the conversations that its inputs are.

Knows nothing of a guard's answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import msgspec

from ...errors import BadRequestError
from ...generation.request import GenerationRequest, sampling_params
from ...prompts.conversation import Message, Part, TextPart
from .. import rules
from ..decoding import ModelName, no_nul
from ..openai.chat_messages import ImageContent, TextContent, part_of
from ..openai.template_options import TEMPLATE_RULES, TemplateVariables, template_options
from ..rules import all_of

MAX_INPUTS = 32
# "unsafe" and the codes of all categories are shorter.
MAX_VERDICT_TOKENS = 96
NUM_LOGPROBS = 20

Input = str | TextContent | ImageContent
Inputs = Annotated[list[Input], msgspec.Meta(min_length=1, max_length=MAX_INPUTS)]


class ModerationRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """input: a text, several texts with a result each, or the parts of one message.

    chat_template_kwargs: the guard's variables, such as categories.
    """

    prose_rules: ClassVar[tuple[str, ...]] = (
        rules.NO_NUL,
        rules.CONTEXT,
        rules.PICTURES,
        rules.TEMPLATE,
        rules.VARIABLES,
        rules.GUARD,
    )
    schema_rules: ClassVar[dict[str, Any]] = all_of(
        *TEMPLATE_RULES,
        {
            "properties": {
                "input": {
                    "anyOf": [
                        {"type": "string"},
                        {"type": "array", "items": {"type": "string"}},
                        {"type": "array", "items": {"type": "object"}},
                    ]
                }
            }
        },
    )

    input: str | Inputs
    model: ModelName | None = None
    chat_template_kwargs: TemplateVariables | None = None


def generations_of(body: ModerationRequest) -> list[GenerationRequest]:
    """What the guard is asked, one generation a result. Raises BadRequestError."""
    return [
        GenerationRequest(
            sampling=msgspec.structs.replace(
                sampling_params(0.0, None, None, 0), num_logprobs=NUM_LOGPROBS
            ),
            messages=(message,),
            messages_field="input",
            template_options=template_options((message,), None, None, body.chat_template_kwargs),
            default_max_tokens=MAX_VERDICT_TOKENS,
        )
        for message in _messages(body.input)
    ]


def _messages(given: str | Sequence[Input]) -> list[Message]:
    if isinstance(given, str):
        return [_of_text(given, "input")]
    texts = [one for one in given if isinstance(one, str)]
    if len(texts) == len(given):
        return [_of_text(text, f"input[{i}]") for i, text in enumerate(texts)]
    parts: list[Part] = []
    for i, part in enumerate(given):
        if isinstance(part, str):
            raise BadRequestError(
                f"input[{i}] is a text among parts: send texts only, or parts only",
                param=f"input[{i}]",
            )
        parts.append(part_of(part, f"input[{i}]"))
    return [Message("user", tuple(parts))]


def _of_text(text: str, field: str) -> Message:
    return Message("user", (TextPart(no_nul(text, field)),))
