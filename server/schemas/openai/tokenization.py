"""POST /tokenize and /detokenize: what clients of other servers of this kind ask.

Owns the two requests and the two answers. Knows nothing of tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, TypedDict

import msgspec

from ...errors import BadRequestError
from ...prompts.chat_template import TemplateOptions
from ...prompts.conversation import Message, Tool
from .. import rules
from ..decoding import ModelName, no_nul
from ..rules import all_of, given, having, only_one_given
from ..sampling import TokenId
from ..tools import ToolList, tools_of
from .chat_messages import MessageList, conversation_of
from .template_options import TEMPLATE_RULES, TemplateVariables, template_options

# More than any context: four prompts of 131,072 tokens.
MAX_TOKENS = 524_288


class TokenizeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Either a prompt, as for /v1/completions, or messages, as for /v1/chat/completions.

    add_special_tokens: `<|begin_of_text|>` stands before a prompt; the tokens of messages are
    those of the chat, which starts with it in any case. tools go with messages.
    """

    prose_rules: ClassVar[tuple[str, ...]] = (
        *rules.OF_CONVERSATIONS,
        rules.CONTEXT,
        *rules.OF_TEMPLATES,
    )
    schema_rules: ClassVar[dict[str, Any]] = all_of(
        only_one_given("prompt", "messages"),
        {"not": {"allOf": [given("prompt"), having("tools", {"type": "array", "minItems": 1})]}},
        *TEMPLATE_RULES,
    )

    model: ModelName | None = None
    prompt: str | None = None
    messages: MessageList | None = None
    tools: ToolList | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Token ids; the names of special tokens are part of their text."""

    prose_rules: ClassVar[tuple[str, ...]] = (rules.NO_NUL, rules.VOCABULARY)

    tokens: Annotated[list[TokenId], msgspec.Meta(max_length=MAX_TOKENS)]
    model: ModelName | None = None


class Tokenized(TypedDict):
    """The answer. tokens: the ids, one for an image; token_strs: where asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(TypedDict):
    """The answer."""

    prompt: str


def prompt_of(body: TokenizeRequest) -> str | None:
    """The text, or None where there are messages. Raises BadRequestError unless one is there."""
    if (body.prompt is None) == (body.messages is None):
        problem = "neither prompt nor messages" if body.prompt is None else "prompt and messages"
        raise BadRequestError(f"the body has {problem}: send one of them", param="prompt")
    if body.prompt is not None and body.tools:
        raise BadRequestError("tools go with messages, not with a prompt", param="tools")
    return None if body.prompt is None else no_nul(body.prompt, "prompt")


def messages_of(body: TokenizeRequest) -> tuple[Message, ...]:
    """The conversation. Raises BadRequestError that names the field."""
    return conversation_of(body.messages or ())


def options_of(body: TokenizeRequest, messages: Sequence[Message]) -> TemplateOptions:
    """How the conversation is to be rendered. Raises BadRequestError that names the field."""
    return template_options(
        messages, body.add_generation_prompt, body.continue_final_message, body.chat_template_kwargs
    )


def offered_tools(body: TokenizeRequest) -> tuple[Tool, ...]:
    """The tools that the prompt would have."""
    return tools_of(body.tools)
