"""POST /v1/completions: the request as OpenAI's clients write it.

Owns the spellings of prompts, names and ranges of what chat completions do not have, and how the
body becomes a `GenerationRequest`. Knows nothing of tokens or of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, cast

import msgspec

from ...errors import BadRequestError
from ...generation.request import GenerationRequest, PlainPrompt
from .. import rules
from ..decoding import no_nul
from ..rules import all_of, needs
from ..sampling import (
    MAX_ANSWERS,
    SHARED_RULES,
    Neutral,
    NumTop,
    SharedFields,
    TokenId,
    bad_words_of,
    check_shared,
    forms_of,
    only_neutral,
    refuse_unless_neutral,
    sampling_of,
    stops_of,
)
from ..structured import only_form

# OpenAI's own default; an unset max_tokens of a chat means what is left of the context.
DEFAULT_MAX_TOKENS = 16

Prompt = str | list[str | TokenId | list[TokenId]]
# All of one kind.
_LISTS = [
    {"type": "array", "minItems": 1, "items": {"type": kind}}
    for kind in ("string", "integer", "array")
]


# Unsupported fields: the values that they may have besides null.
REFUSED: dict[str, Neutral] = {
    "suffix": Neutral(("",), "this model continues a text, it fills no gap. Leave it out"),
}


class CompletionRequest(SharedFields, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body. prompt: a text, token ids, or a list of either; null starts a new document.

    What a text spells is text: special tokens come as token ids, but for the first one, which
    add_special_tokens puts in front of texts. logprobs: of the tokens, and how many of the
    likeliest ones beside each. best_of: n, or 1. suffix: not supported.
    """

    prose_rules: ClassVar[tuple[str, ...]] = (
        *rules.OF_GENERATIONS,
        *rules.OF_SAMPLING,
        rules.BEST_OF,
        rules.TOKENS,
    )
    schema_rules: ClassVar[dict[str, Any]] = all_of(
        *SHARED_RULES,
        only_neutral(REFUSED),
        needs("max_tokens", {"const": 0}, "echo", {"const": True}),
        {"properties": {"prompt": {"anyOf": [{"type": ["string", "null"]}, *_LISTS]}}},
    )

    prompt: Prompt | None
    max_tokens: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None = None
    echo: bool | None = None
    logprobs: NumTop | None = None
    best_of: Annotated[int, msgspec.Meta(ge=1, le=MAX_ANSWERS)] | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None

    @property
    def is_echo_only(self) -> bool:
        """Nothing is to be generated: the prompt itself is the answer."""
        return bool(self.echo) and self.max_tokens == 0


WITHOUT_EFFECT = frozenset({"user"})


def completion_generation(body: CompletionRequest) -> GenerationRequest:
    """What is to be generated for this body.

    Raises BadRequestError that names the field and the remedy.
    """
    refuse_unless_neutral(body, REFUSED)
    check_shared(body)
    prompts = _prompts(body.prompt)
    _check_numbers(body, len(prompts))
    form = only_form(forms_of(body))
    # With echo, the prompt's tokens have log-probabilities like the answer's.
    num_echoed = body.logprobs if body.echo else None
    asked = [num for num in (body.prompt_logprobs, num_echoed) if num is not None]
    return GenerationRequest(
        is_streamed=bool(body.stream),
        prompts=prompts,
        add_special_tokens=body.add_special_tokens is not False,
        has_seed=body.seed is not None,
        grammar=form.grammar if form else None,
        grammar_field=form.field if form else "",
        grammar_parts=form.parts if form else (),
        ignored_fields=form.ignored if form else (),
        sampling=sampling_of(body, body.logprobs),
        # The engine generates at least one token, which is then dropped.
        max_tokens=1 if body.is_echo_only else body.max_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        stop=stops_of(body.stop),
        bad_words=bad_words_of(body),
        text=body.text_options,
        num_kept_tokens=body.truncate_prompt_tokens or None,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        num_choices=body.n or 1,
        num_prompt_logprobs=max(asked, default=None),
        prompt_logprobs_field="prompt_logprobs" if num_echoed is None else "logprobs",
        priority=body.priority or 0,
        timeout_s=body.timeout_s,
    )


def _check_numbers(body: CompletionRequest, num_prompts: int) -> None:
    n = body.n or 1
    if num_prompts * n > MAX_ANSWERS:
        raise BadRequestError(
            f"prompt has {num_prompts:,} prompts of {n} answers each; a request has at most"
            f" {MAX_ANSWERS} answers: send fewer",
            param="prompt",
        )
    if body.best_of not in (None, 1, n):
        raise BadRequestError(
            f"best_of is {body.best_of} and n is {n}: answers are not ranked. Leave it out",
            param="best_of",
        )
    if body.max_tokens == 0 and not body.echo:
        raise BadRequestError("max_tokens is 0: send at least 1, or echo: true", param="max_tokens")


def _prompts(prompt: Prompt | None) -> tuple[PlainPrompt, ...]:
    """The prompts in any of their spellings. Raises BadRequestError where two are mixed."""
    if prompt is None or isinstance(prompt, str):
        return (PlainPrompt(no_nul(prompt or "", "prompt"), "prompt"),)
    if not prompt:
        raise BadRequestError("prompt is an empty list: send at least one prompt", param="prompt")
    kind = type(prompt[0])
    for index, one in enumerate(prompt):
        if type(one) is not kind:
            raise BadRequestError(
                f"prompt[{index}] is of another kind than prompt[0]: send texts, or token ids, or"
                " lists of token ids",
                param=f"prompt[{index}]",
            )
    if kind is int:
        return (PlainPrompt(tuple(cast(Sequence[int], prompt)), "prompt"),)
    return tuple(_one_of(one, f"prompt[{index}]") for index, one in enumerate(prompt))


def _one_of(prompt: str | int | list[int], field: str) -> PlainPrompt:
    assert not isinstance(prompt, int), "a list of token ids is one prompt"
    content = no_nul(prompt, field) if isinstance(prompt, str) else tuple(prompt)
    return PlainPrompt(content, field)
