"""POST /v1/chat/completions: the request as OpenAI's clients write it.

Owns names, ranges and spellings of the request, and how it becomes a
`GenerationRequest`. Knows nothing of tokens or of the answer.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ...errors import BadRequestError
from ...generation.request import GenerationRequest
from ...prompts.conversation import Tool
from .. import rules
from ..allowed_values import Notes
from ..rules import all_of, needs
from ..sampling import (
    SHARED_RULES,
    MaxTokens,
    Neutral,
    NumTop,
    SharedFields,
    bad_words_of,
    check_shared,
    forms_of,
    only_neutral,
    refuse_unless_neutral,
    sampling_of,
    stops_of,
)
from ..structured import answer_form
from ..tools import (
    ToolChoice,
    ToolList,
    allowed_of,
    check_choice,
    choice_of,
    tools_of,
)
from .chat_messages import MessageList, conversation_of
from .template_options import TEMPLATE_RULES, TemplateVariables, template_options

# Unsupported fields: the values that they may have besides null.
REFUSED: dict[str, Neutral] = {
    "audio": Neutral(({},), "this model answers in text. Leave it out"),
    "function_call": Neutral(("none", "auto", {}), "use tool_choice"),
    "functions": Neutral(([],), "use tools"),
    "modalities": Neutral(([], ["text"]), "this model answers in text. Leave it out"),
    "moderation": Neutral(({},)),
    "prediction": Neutral(({},)),
    "prompt_cache_options": Neutral(
        ({"mode": "implicit", "ttl": "30m"},),
        "prompts are cached by themselves. Leave it out",
    ),
    "prompt_cache_retention": Neutral(
        ("in_memory",), "prompts are kept while there is room. Leave it out"
    ),
    "reasoning_effort": Neutral(("none",), "this model does not reason. Leave it out"),
    "service_tier": Neutral(("auto", "default"), "use priority"),
    "store": Neutral((False,), "nothing is stored. Leave it out"),
    "verbosity": Neutral(("medium",), "ask for a length in the prompt"),
    "web_search_options": Neutral(()),
}


class ChatCompletionRequest(SharedFields, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body. Fields of `REFUSED` are taken at their neutral values only."""

    notes: ClassVar[Notes] = {
        "role": {"function": 'The result of a call has the role "tool"'},
        "type": {"custom": "Describe the tool as a function"},
    }
    prose_rules: ClassVar[tuple[str, ...]] = (
        *rules.OF_CHATS,
        *rules.OF_SAMPLING,
        *rules.OF_TEMPLATES,
        rules.RESULTS,
        rules.ONE_MAXIMUM,
    )
    schema_rules: ClassVar[dict[str, Any]] = all_of(
        *SHARED_RULES,
        *TEMPLATE_RULES,
        only_neutral(REFUSED),
        needs("top_logprobs", {"type": "integer", "minimum": 1}, "logprobs", {"const": True}),
        needs(
            "tool_choice",
            {"anyOf": [{"const": "required"}, {"type": "object"}]},
            "tools",
            {"type": "array", "minItems": 1},
        ),
    )

    messages: MessageList
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: NumTop | None = None
    tools: ToolList | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    # Taken at their neutral values only.
    audio: dict[str, Any] | None = None
    function_call: str | dict[str, Any] | None = None
    functions: list[Any] | None = None
    modalities: list[str] | None = None
    moderation: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    reasoning_effort: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    verbosity: str | None = None
    web_search_options: dict[str, Any] | None = None
    # Taken without effect.
    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None


WITHOUT_EFFECT = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "user"})


def chat_generation(body: ChatCompletionRequest) -> GenerationRequest:
    """What is to be generated for this body.

    Raises BadRequestError that names the field and the remedy.
    """
    refuse_unless_neutral(body, REFUSED)
    check_shared(body)
    tools = _offered_tools(body)
    max_calls = 1 if body.parallel_tool_calls is False else None
    form = answer_form(forms_of(body), tools, choice_of(body.tool_choice), max_calls)
    messages = conversation_of(body.messages)
    return GenerationRequest(
        is_streamed=bool(body.stream),
        messages=messages,
        template_options=template_options(
            messages,
            body.add_generation_prompt,
            body.continue_final_message,
            body.chat_template_kwargs,
        ),
        tools=tools,
        grammar=form.grammar if form else None,
        grammar_field=form.field if form else "",
        grammar_parts=form.parts if form else (),
        ignored_fields=form.ignored if form else (),
        max_tool_calls=max_calls,
        sampling=sampling_of(body, _num_logprobs(body)),
        max_tokens=_max_tokens(body),
        max_tokens_field=_max_tokens_field(body),
        stop=stops_of(body.stop),
        bad_words=bad_words_of(body),
        text=body.text_options,
        num_kept_tokens=body.truncate_prompt_tokens or None,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        num_choices=body.n or 1,
        num_prompt_logprobs=body.prompt_logprobs,
        priority=body.priority or 0,
        timeout_s=body.timeout_s,
    )


def _num_logprobs(body: ChatCompletionRequest) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise BadRequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    return None


def _offered_tools(body: ChatCompletionRequest) -> tuple[Tool, ...]:
    """The tools in the prompt: those that the model may call."""
    tools = allowed_of(body.tool_choice, tools_of(body.tools))
    choice = choice_of(body.tool_choice)
    check_choice(choice, tools)
    return () if choice == "none" else tools


def _max_tokens(body: ChatCompletionRequest) -> int | None:
    """max_completion_tokens is the newer name of max_tokens."""
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise BadRequestError(
            f"max_tokens is {old} and max_completion_tokens is {new}: send one of them",
            param="max_completion_tokens",
        )
    return old if new is None else new


def _max_tokens_field(body: ChatCompletionRequest) -> str:
    return "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
