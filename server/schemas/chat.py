"""POST /v1/chat/completions: the request as OpenAI's clients write it.

Owns names, ranges and spellings of the request, and how it becomes a
`GenerationRequest`. Knows nothing of tokens or of the answer.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec

from ...models.batch import Bias, Penalty, SamplingParams
from ..conversation import Tool
from ..errors import BadRequestError
from ..requests import GenerationRequest, sampling_params
from .chat_messages import MessageList, conversation_of
from .decoding import ModelName, no_nul
from .structured import (
    Choices,
    Form,
    Guided,
    ResponseFormat,
    call_form,
    guided_forms,
    only_form,
    response_form,
)
from .tools import (
    ToolChoice,
    ToolList,
    check_choice,
    choice_of,
    tools_of,
)

INT64 = msgspec.Meta(ge=-(2**63), le=2**63 - 1)
StopString = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
TokenId = Annotated[int, msgspec.Meta(ge=0)]

# One spelling each, so that no id has two biases.
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None


class ChatCompletionRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body. Fields of `NOT_YET` are taken at their neutral value only."""

    model: ModelName
    messages: MessageList
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)] | None = None
    seed: Annotated[int, INT64] | None = None
    stop: StopString | Annotated[list[StopString], msgspec.Meta(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], msgspec.Meta(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] | None = None
    min_tokens: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0.0, le=2.0)] | None = None
    logit_bias: Annotated[dict[str, Bias], msgspec.Meta(max_length=1024)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    cache_salt: Annotated[str, msgspec.Meta(min_length=1, max_length=256)] | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=128)] | None = None
    priority: Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    response_format: ResponseFormat | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    nvext: Guided | None = None
    timeout_s: Annotated[float, msgspec.Meta(gt=0.0)] | None = None
    tools: ToolList | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    prompt_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    # Taken at their neutral value only, see NOT_YET and REPLACED.
    functions: list[Any] | None = None
    function_call: str | dict[str, Any] | None = None
    # Taken without effect.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: bool | None = None
    service_tier: str | None = None


# What each field may hold besides null until it is built.
NOT_YET: dict[str, tuple[Any, ...]] = {
    "store": (False,),
    "service_tier": ("auto",),
}

# What the newer fields of OpenAI's own API have taken the place of.
REPLACED: dict[str, tuple[tuple[Any, ...], str]] = {
    "functions": (([],), "tools"),
    "function_call": (("none", "auto"), "tool_choice"),
}


def chat_generation(body: ChatCompletionRequest) -> GenerationRequest:
    """What is to be generated for this body.

    Raises BadRequestError that names the field and the remedy.
    """
    refuse_not_yet(body, NOT_YET)
    _refuse_replaced(body)
    if body.top_k == 0:
        raise BadRequestError("top_k is 0: send -1 for off, or at least 1", param="top_k")
    tools = _offered_tools(body)
    max_calls = 1 if body.parallel_tool_calls is False else None
    call = call_form(tools, choice_of(body.tool_choice), max_calls)
    form = only_form([*_forms(body), *call])
    return GenerationRequest(
        messages=conversation_of(body.messages),
        tools=tools,
        grammar=form.grammar if form else None,
        grammar_field=form.field if form else "",
        max_tool_calls=max_calls,
        sampling=_sampling(body),
        max_tokens=_max_tokens(body),
        max_tokens_field=_max_tokens_field(body),
        stop=_stops(body.stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        num_choices=body.n or 1,
        num_prompt_logprobs=_num_prompt_logprobs(body),
        priority=body.priority or 0,
        timeout_s=body.timeout_s,
    )


def _forms(body: ChatCompletionRequest) -> list[Form]:
    """Every form that the body asks for; more than one is an error."""
    top = Guided(
        guided_json=body.guided_json,
        guided_regex=body.guided_regex,
        guided_choice=body.guided_choice,
        guided_grammar=body.guided_grammar,
    )
    inner = body.nvext or Guided()
    forms = [*guided_forms(top), *guided_forms(inner, "nvext.")]
    return [*response_form(body.response_format), *forms]


def _sampling(body: ChatCompletionRequest) -> SamplingParams:
    """All that decides which token comes next; null leaves a field at its default."""
    return msgspec.structs.replace(
        sampling_params(body.temperature, body.top_p, body.top_k, body.seed),
        min_p=body.min_p or 0.0,
        min_tokens=body.min_tokens or 0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        logit_bias=_logit_bias(body.logit_bias or {}),
        num_logprobs=_num_logprobs(body),
    )


def _logit_bias(biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
    """JSON's keys are strings; OpenAI's clients write token ids into them."""
    for key in biases:
        if not _TOKEN_ID.fullmatch(key):
            raise BadRequestError(
                f"logit_bias has the key {key[:32]!r}: its keys are token ids in decimal",
                param="logit_bias",
            )
    return tuple((int(key), bias) for key, bias in biases.items())


def _num_logprobs(body: ChatCompletionRequest) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise BadRequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    return None


def _num_prompt_logprobs(body: ChatCompletionRequest) -> int | None:
    if body.prompt_logprobs is not None and body.stream:
        raise BadRequestError(
            "prompt_logprobs come with a whole answer only: leave stream out",
            param="prompt_logprobs",
        )
    return body.prompt_logprobs


def refuse_not_yet(body: msgspec.Struct, neutral: dict[str, tuple[Any, ...]]) -> None:
    """Raises BadRequestError at the first field that asks for what is not built yet."""
    for field, values in neutral.items():
        value = getattr(body, field)
        if value is not None and value not in values:
            raise BadRequestError(f"{field} is not supported yet: leave it out", param=field)


def _refuse_replaced(body: ChatCompletionRequest) -> None:
    for field, (neutral, newer) in REPLACED.items():
        value = getattr(body, field)
        if value is not None and value not in neutral:
            raise BadRequestError(f"{field} is not supported: use {newer}", param=field)


def _offered_tools(body: ChatCompletionRequest) -> tuple[Tool, ...]:
    """The tools that the model is told of: none where it may call none."""
    tools = tools_of(body.tools)
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


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    return tuple(no_nul(text, "stop") for text in stops)
