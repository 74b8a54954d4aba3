"""Fields shared by chat and text completions of OpenAI's API: sampling, stops, forms, streams.

Owns their names, ranges and spellings, and their conversion to parts of a `GenerationRequest`.
Knows nothing of messages, prompts or answers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import msgspec

from ...models.batch import Bias, Penalty, SamplingParams
from ..errors import BadRequestError
from ..generation.request import TextOptions, sampling_params
from .allowed_values import or_list, quoted
from .decoding import ModelName, no_nul
from .foreign import EMPTY, FOREIGN, is_neutral
from .rules import all_of, given, having, needs
from .structured import (
    Choices,
    Form,
    Guided,
    ResponseFormat,
    StructuredOutputs,
    guided_forms,
    renamed_forms,
    response_form,
    structured_forms,
)

INT64 = msgspec.Meta(ge=-(2**63), le=2**63 - 1)
StopString = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
MaxTokens = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
TopK = Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)]
BadWord = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
NumTop = Annotated[int, msgspec.Meta(ge=0, le=20)]

# SGLang's names of the guided fields.
SGLANG_NAMES = {"guided_json": "json_schema", "guided_regex": "regex", "guided_grammar": "ebnf"}

# Answers of one request, to all its prompts.
MAX_ANSWERS = 128

# One spelling for each id, so that no id has two biases.
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
_BY_TOKEN_ID = msgspec.Meta(
    max_length=1024,
    extra_json_schema={"propertyNames": {"pattern": f"^({_TOKEN_ID.pattern})$"}},
)

STREAM_OPTIONS = ("include_usage", "include_obfuscation", "continuous_usage_stats")

# The rules of `check_shared`, for the API's document.
SHARED_RULES = (
    needs(
        "stream_options",
        {"anyOf": [having(name, {"const": True}) for name in STREAM_OPTIONS]},
        "stream",
        {"const": True},
    ),
    {"not": all_of(given("prompt_logprobs"), having("stream", {"const": True}))},
)


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """include_obfuscation: each chunk has random characters, which hide its size.

    continuous_usage_stats: every chunk has the usage so far, as in vLLM.
    """

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None

    @property
    def is_set(self) -> bool:
        """An option is true, so the answer must be a stream."""
        return any(getattr(self, name) for name in STREAM_OPTIONS)


class SharedFields(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Null leaves a field at its default. top_k: 0 and -1 are off. top_p: 0 is greedy.

    include_stop_str_in_output, and no_stop_trim, its name in SGLang: a stop string or token that
    ends the answer stays in its text. skip_special_tokens false: special tokens are text.
    allowed_token_ids: no other token may come. bad_words: texts that the answer does not contain in
    their usual tokens. return_token_ids: of prompts and answers; return_prompt_token_ids, SGLang's:
    of prompts, in each choice. return_timings: where the time went, and the tiles of images.
    return_tokens_as_token_ids: log-probabilities name tokens by their ids. truncate_prompt_tokens:
    only so many tokens at a prompt's end are read; -1: as many as leave room for the answer; 0:
    all. regex, ebnf, json_schema: SGLang's names of guided_regex, guided_grammar and guided_json.
    """

    foreign: ClassVar[Mapping[str, tuple[Any, ...]]] = FOREIGN

    model: ModelName
    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] | None = None
    top_k: TopK | None = None
    seed: Annotated[int, INT64] | None = None
    stop: StopString | Annotated[list[StopString], msgspec.Meta(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], msgspec.Meta(max_length=1024)] | None = None
    include_stop_str_in_output: bool | None = None
    no_stop_trim: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_timings: bool | None = None
    return_prompt_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    truncate_prompt_tokens: Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)] | None = None
    allowed_token_ids: Annotated[list[TokenId], msgspec.Meta(max_length=1024)] | None = None
    bad_words: Annotated[list[BadWord], msgspec.Meta(max_length=128)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] | None = None
    min_tokens: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0.0, le=2.0)] | None = None
    logit_bias: Annotated[dict[str, Bias], _BY_TOKEN_ID] | None = None
    cache_salt: Annotated[str, msgspec.Meta(min_length=1, max_length=256)] | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=MAX_ANSWERS)] | None = None
    priority: Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    response_format: ResponseFormat | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    json_schema: str | dict[str, Any] | None = None
    nvext: Guided | None = None
    structured_outputs: StructuredOutputs | None = None
    timeout_s: Annotated[float, msgspec.Meta(gt=0.0)] | None = None
    prompt_logprobs: NumTop | None = None
    # Taken without effect.
    user: str | None = None

    @property
    def text_options(self) -> TextOptions:
        """How tokens are reported and become text."""
        return TextOptions(
            keeps_stop=bool(self.include_stop_str_in_output or self.no_stop_trim),
            shows_special=self.skip_special_tokens is False,
            has_token_ids=bool(self.return_token_ids),
            names_by_id=bool(self.return_tokens_as_token_ids),
        )


class Neutral(msgspec.Struct, frozen=True):
    """The values that an unsupported field may have besides null, and the remedy.

    An object among the values stands for each object of some of its members.
    """

    values: tuple[Any, ...]
    remedy: str = "leave it out"

    @property
    def schema(self) -> dict[str, Any]:
        """The values, for the API's document."""
        objects = [_some_members(one) for one in self.values if isinstance(one, dict)]
        plain = {"enum": [one for one in self.values if not isinstance(one, dict)] + [None]}
        return {"anyOf": [plain, *objects]} if objects else plain


def _some_members(neutral: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {name: {"enum": [one, *EMPTY]} for name, one in neutral.items()},
        "additionalProperties": {"enum": list(EMPTY)},
    }


def only_neutral(fields: Mapping[str, Neutral]) -> dict[str, Any]:
    """What `refuse_unless_neutral` accepts, for the API's document."""
    return {"properties": {name: one.schema for name, one in fields.items()}}


def refuse_unless_neutral(body: msgspec.Struct, fields: Mapping[str, Neutral]) -> None:
    """Raises BadRequestError for the first field with an unsupported value."""
    for field, neutral in fields.items():
        value = getattr(body, field)
        if value is not None and not is_neutral(value, neutral.values):
            may_be = or_list([*map(quoted, neutral.values)])
            accepted = f". It may be {may_be}" if may_be else ""
            raise BadRequestError(
                f"{field} is not supported: {neutral.remedy}{accepted}", param=field
            )


def check_shared(body: SharedFields) -> None:
    """Check constraints between fields. Raises BadRequestError that names the field."""
    if body.stream_options is not None and body.stream_options.is_set and not body.stream:
        raise BadRequestError("stream_options needs stream: true", param="stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise BadRequestError(
            "prompt_logprobs come with a whole answer only: leave stream out",
            param="prompt_logprobs",
        )


def sampling_of(body: SharedFields, num_logprobs: int | None) -> SamplingParams:
    """The sampling parameters; null leaves a field at its default."""
    # A top_p of 0 keeps only the likeliest token.
    temperature = 0.0 if body.top_p == 0 else body.temperature
    return msgspec.structs.replace(
        sampling_params(temperature, body.top_p or None, body.top_k, body.seed),
        min_p=body.min_p or 0.0,
        min_tokens=body.min_tokens or 0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        logit_bias=_logit_bias(body.logit_bias or {}),
        allowed_token_ids=tuple(dict.fromkeys(body.allowed_token_ids or ())),
        num_logprobs=num_logprobs,
    )


def forms_of(body: SharedFields) -> list[Form]:
    """All forms that the body requests; more than one is an error."""
    top = Guided(
        guided_json=body.guided_json,
        guided_regex=body.guided_regex,
        guided_choice=body.guided_choice,
        guided_grammar=body.guided_grammar,
    )
    of_sglang = Guided(
        guided_json=body.json_schema, guided_regex=body.regex, guided_grammar=body.ebnf
    )
    inner = body.nvext or Guided()
    forms = [*guided_forms(top), *guided_forms(inner, "nvext.")]
    forms += renamed_forms(of_sglang, SGLANG_NAMES)
    if body.structured_outputs is not None:
        forms += structured_forms(body.structured_outputs)
    return [*response_form(body.response_format), *forms]


def stops_of(stop: str | list[str] | None) -> tuple[str, ...]:
    """The stop strings, one or several."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    return tuple(no_nul(text, "stop") for text in stops)


def bad_words_of(body: SharedFields) -> tuple[str, ...]:
    """The words that the answer must not contain."""
    return tuple(no_nul(word, "bad_words") for word in body.bad_words or ())


def _logit_bias(biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
    """The keys are token ids as strings, as OpenAI's clients write them."""
    for key in biases:
        if not _TOKEN_ID.fullmatch(key):
            raise BadRequestError(
                f"logit_bias has the key {key[:32]!r}: its keys are token ids in decimal",
                param="logit_bias",
            )
    return tuple((int(key), bias) for key, bias in biases.items())
