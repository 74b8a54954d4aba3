"""A request to generate, in one form for all APIs.

Owns the request and its checks against the loaded model. Knows nothing of HTTP, prompts or the
engine's work.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from ...models.batch import AdapterRef, SamplingParams
from ...router.messages import NO_POLICY, EngineReady, OwnerPolicy
from ..errors import BadRequestError
from ..prompts.chat_template import AS_USUAL, TemplateOptions
from ..prompts.conversation import Message, Tool, ToolFormat

# Log-probabilities of a prompt in one answer: about 5 MB of JSON, a tenth of a second to write.
MAX_PROMPT_ENTRIES = 65_536
# Log-probabilities of an answer that is not streamed: about 20 MB of JSON.
MAX_ANSWER_LOGPROBS = 262_144


@dataclass(slots=True, frozen=True)
class PlainPrompt:
    """A prompt without a conversation: a text, or token ids.

    field: its place in the client's body, for errors.
    """

    content: str | tuple[int, ...]
    field: str


@dataclass(slots=True, frozen=True, kw_only=True)
class TextOptions:
    """How tokens are reported and become text.

    keeps_stop: a stop string or token that ends the answer stays in its text. shows_special:
    special tokens are text, by their names. has_token_ids: events have the ids of their tokens.
    names_by_id: log-probabilities name tokens `token_id:ID`.
    """

    keeps_stop: bool = False
    shows_special: bool = False
    has_token_ids: bool = False
    names_by_id: bool = False


TEXT_AS_USUAL = TextOptions()


@dataclass(slots=True, frozen=True, kw_only=True)
class GenerationRequest:
    """What to generate: an answer to one conversation, or continuations of plain prompts.

    max_tokens: None means default_max_tokens or the rest of the context, whichever is less.
    has_seed: the client set a seed; all prompts then use it.
    add_special_tokens: a plain text starts with `<|begin_of_text|>`.
    tenant: requests share cached images and texts only within a tenant.
    bad_words: texts that the answer does not contain in their usual tokens.
    is_streamed: the answer is sent while it is generated, so its length takes no memory.
    owner, policy: the API key's hash and limits; owners share the machine. adapter: None: the base
    model.
    num_choices: answers per prompt. num_prompt_logprobs: likeliest tokens to report for each token
    of the prompt. priority: lower values go first. timeout_s: from the request's arrival to the end
    of its answer. num_kept_tokens: read only this many tokens at the end of a longer prompt; -1: as
    many as leave room for the answer; None: all.
    template_options: how to render the conversation.
    tools, tool_format: the tools in the prompt and their format. max_tool_calls: the answer ends
    after this many; None: no limit. grammar, grammar_field: the form of the answer, not compiled
    yet, and its field. grammar_parts: schemas within it, each with its field. ignored_fields:
    parts of the form that have no effect.
    """

    sampling: SamplingParams
    messages: tuple[Message, ...] = ()
    messages_field: str = "messages"
    prompts: tuple[PlainPrompt, ...] = ()
    add_special_tokens: bool = True
    has_seed: bool = True
    max_tokens: int | None = None
    default_max_tokens: int | None = None
    max_tokens_field: str = "max_tokens"
    stop: tuple[str, ...] = ()
    bad_words: tuple[str, ...] = ()
    text: TextOptions = TEXT_AS_USUAL
    num_kept_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    tenant: str = ""
    is_streamed: bool = False
    owner: str = ""
    policy: OwnerPolicy = NO_POLICY
    adapter: AdapterRef | None = None
    num_choices: int = 1
    num_prompt_logprobs: int | None = None
    prompt_logprobs_field: str = "prompt_logprobs"
    priority: int = 0
    timeout_s: float | None = None
    tools: tuple[Tool, ...] = ()
    tool_format: ToolFormat = "json"
    template_options: TemplateOptions = AS_USUAL
    max_tool_calls: int | None = None
    grammar: str | None = None
    grammar_field: str = ""
    grammar_parts: tuple[tuple[str, str], ...] = ()
    ignored_fields: tuple[str, ...] = ()


def sampling_params(
    temperature: float | None, top_p: float | None, top_k: int | None, seed: int | None
) -> SamplingParams:
    """Sampling with the API's default for each None, and a random seed if seed is None."""
    return SamplingParams(
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        top_k=top_k or -1,
        # The sign has no meaning for a random stream: 63 bits, never negative.
        seed=secrets.randbits(63) if seed is None else seed & (2**63 - 1),
    )


def check_against(info: EngineReady, request: GenerationRequest) -> None:
    """Raises BadRequestError for what the loaded model cannot do, before any work."""
    if request.max_tokens is not None and request.max_tokens >= info.max_model_len:
        field = request.max_tokens_field
        raise BadRequestError(
            f"{field} is {request.max_tokens:,}; max_model_len is {info.max_model_len:,}"
            " with the prompt: lower it or start with a larger --max-model-len",
            param=field,
        )
    if request.num_choices > info.max_num_seqs:
        raise BadRequestError(
            f"n is {request.num_choices}; this server runs {info.max_num_seqs} answers at once:"
            " lower it or start with a larger --max-num-seqs",
            param="n",
        )
    named = {
        "stop_token_ids": request.stop_token_ids,
        "logit_bias": [token_id for token_id, _ in request.sampling.logit_bias],
        "allowed_token_ids": request.sampling.allowed_token_ids,
    }
    for field, token_ids in named.items():
        check_token_ids(info, token_ids, field)


def check_answers(request: GenerationRequest, limit: int) -> None:
    """Raises BadRequestError if the request asks for more answers than a request, or its key, may.

    Each of several prompts counts its answers.
    """
    num_answers = request.num_choices * max(1, len(request.prompts))
    is_by_n = num_answers == request.num_choices
    asked = f"n is {num_answers}" if is_by_n else f"n times the prompts are {num_answers} answers"
    field = "n" if is_by_n else request.prompts[0].field.partition("[")[0]
    most = request.policy.max_concurrent
    if most is not None and num_answers > most:
        raise BadRequestError(
            f"{asked}; this API key may have {most} at once: ask for fewer", param=field
        )
    if num_answers > limit:
        raise BadRequestError(
            f"{asked}; a request may ask for {limit}: ask for fewer or start the server with a "
            "larger --max-answers-per-request",
            param=field,
        )


def check_token_ids(info: EngineReady, token_ids: Sequence[int], field: str) -> None:
    """Raises BadRequestError if the model has no such token."""
    if token_ids and max(token_ids) >= info.vocab_size:
        raise BadRequestError(
            f"{field} contains {max(token_ids)}; the vocabulary ends at {info.vocab_size - 1}",
            param=field,
        )


def check_prompt_logprobs(request: GenerationRequest, num_prompt: int) -> None:
    """Raises BadRequestError if the prompt's log-probabilities would be too many."""
    if request.num_prompt_logprobs is None:
        return
    field = request.prompt_logprobs_field
    # Each answer to a plain prompt repeats the prompt's entries.
    num_copies = request.num_choices if request.prompts else 1
    num_entries = num_copies * num_prompt * (1 + request.num_prompt_logprobs)
    if num_entries > MAX_PROMPT_ENTRIES:
        raise BadRequestError(
            f"{field} {request.num_prompt_logprobs} of {num_copies * num_prompt:,} prompt tokens"
            f" are {num_entries:,} log-probabilities, the limit is {MAX_PROMPT_ENTRIES:,}: ask for"
            " fewer or shorten the prompt",
            param=field,
        )


def check_answer_logprobs(
    request: GenerationRequest, rooms: Sequence[int], max_entries: int
) -> list[int]:
    """The rooms, within the log-probabilities that an answer may have if it is not streamed.

    rooms: the tokens that each prompt leaves for an answer. Without max_tokens they are lowered to
    the limit. Raises BadRequestError if max_tokens asks for more.
    """
    num_top = request.sampling.num_logprobs
    if num_top is None or request.is_streamed:
        return list(rooms)
    num_entries = sum(rooms) * request.num_choices * (1 + num_top)
    if num_entries <= max_entries:
        return list(rooms)
    num_answers = len(rooms) * request.num_choices
    most = max_entries // (num_answers * (1 + num_top))
    if request.max_tokens is None and most:
        return [min(one, most) for one in rooms]
    field = request.max_tokens_field
    raise BadRequestError(
        f"{field} {max(rooms):,} of {num_answers:,} answers with {1 + num_top} log-probabilities a"
        f" token are {num_entries:,} log-probabilities, the limit of an answer that is not streamed"
        f" is {max_entries:,}: stream it, or ask for fewer",
        param=field,
    )


def check_min_tokens(min_tokens: int, max_tokens: int) -> None:
    if min_tokens > max_tokens:
        raise BadRequestError(
            f"min_tokens is {min_tokens:,}, but at most {max_tokens:,} tokens may be generated:"
            " lower it or raise max_tokens",
            param="min_tokens",
        )


def cut_to(request: GenerationRequest, max_model_len: int) -> int | None:
    """How many tokens at the end of each prompt are read; None for all."""
    if request.num_kept_tokens == -1:
        return max(1, max_model_len - (request.max_tokens or 1))
    return request.num_kept_tokens


def room(request: GenerationRequest, num_prompt: int, max_model_len: int) -> int:
    """The number of tokens that may be generated.

    Raises BadRequestError if prompt and max_tokens do not fit the context.
    """
    left = max_model_len - num_prompt
    if request.max_tokens is None:
        return min(left, request.default_max_tokens or left)
    if request.max_tokens > left:
        field = request.max_tokens_field
        raise BadRequestError(
            f"the prompt has {num_prompt:,} tokens and {field} is {request.max_tokens:,};"
            f" max_model_len is {max_model_len:,}: lower {field} to {left:,} or shorten the prompt",
            param=field,
        )
    return request.max_tokens
