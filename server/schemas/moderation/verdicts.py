"""What a guard's answer means, and the answer of POST /v1/moderations.

A guard of Llama Guard's family answers `safe`, or `unsafe` and on the next line the codes of the
categories, such as S1,S7. The policy in its prompt names the categories. Knows nothing of prompts
or tokens beside their texts.
"""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from ...errors import InternalError
from ...generation.token_text import TokenEntry, TokenLogprob
from ...prompts.conversation import ImagePart, Message, TextPart

InputType = Literal["text", "image"]
SAFE, UNSAFE = "safe", "unsafe"
_POLICY = re.compile(
    r"BEGIN UNSAFE CONTENT CATEGORIES>?\s*(.*?)\s*<?END UNSAFE CONTENT CATEGORIES", re.DOTALL
)
_CATEGORY = re.compile(r"^([^\s:]+): *(.+?)\.?$", re.MULTILINE)
_CODE = re.compile(r"[^\s,]+")


class ModerationResult(TypedDict):
    """What the guard says of one input.

    categories: whether it named each category of its policy. category_scores: the probability of
    `unsafe` for the categories that it named, and for all if it named none; else 0.
    """

    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[InputType]]


class Moderation(TypedDict):
    """The answer. results: in the order of the inputs."""

    id: str
    model: str
    results: list[ModerationResult]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A guard's answer. codes: of the categories. unsafe: the probability of that word."""

    is_unsafe: bool
    codes: tuple[str, ...]
    unsafe: float


def verdict_of(text: str, entries: Sequence[TokenEntry]) -> Verdict:
    """The verdict in an answer. Raises InternalError if it is none.

    entries: of the answer's tokens, with their likeliest candidates.
    """
    word, _, rest = text.strip().partition("\n")
    if word.strip().lower() not in (SAFE, UNSAFE):
        raise InternalError(
            "the guard answered neither safe nor unsafe: check that the model is a guard"
        )
    is_unsafe = word.strip().lower() == UNSAFE
    codes = tuple(dict.fromkeys(_CODE.findall(rest))) if is_unsafe else ()
    return Verdict(is_unsafe, codes, _probability(entries, is_unsafe))


def moderation_of(model: str, results: list[ModerationResult]) -> Moderation:
    """The whole answer."""
    return {"id": f"modr-{uuid.uuid4().hex}", "model": model, "results": results}


def result_of(verdict: Verdict, prompt: str, message: Message) -> ModerationResult:
    """The result for one input. prompt: the guard's, with its policy."""
    names = categories_of(prompt)
    names |= {code: code for code in verdict.codes if code not in names}
    named = set(verdict.codes)
    scored = named or set(names)
    types: list[InputType] = []
    if any(isinstance(part, TextPart) for part in message.parts):
        types.append("text")
    if any(isinstance(part, ImagePart) for part in message.parts):
        types.append("image")
    return {
        "flagged": verdict.is_unsafe,
        "categories": {name: code in named for code, name in names.items()},
        "category_scores": {
            name: verdict.unsafe if code in scored else 0.0 for code, name in names.items()
        },
        "category_applied_input_types": {name: list(types) for name in names.values()},
    }


def categories_of(prompt: str) -> dict[str, str]:
    """The names of the policy's categories by their codes, in its order; equal names keep codes."""
    policy = _POLICY.search(prompt)
    found: Mapping[str, str] = dict(_CATEGORY.findall(policy[1])) if policy else {}
    names = list(found.values())
    return {
        code: name if names.count(name) == 1 else f"{code}: {name}" for code, name in found.items()
    }


def _probability(entries: Sequence[TokenEntry], is_unsafe: bool) -> float:
    """The probability of `unsafe` against `safe`, where the answer's first word begins."""
    for entry in entries:
        if not entry.chosen.token.text.strip():
            continue
        candidates = {one.token.text: one for one in (*entry.top, entry.chosen)}.values()
        safe, unsafe = (_share(candidates, word) for word in (SAFE, UNSAFE))
        if safe + unsafe > 0:
            return unsafe / (safe + unsafe)
        break
    return float(is_unsafe)


def _share(candidates: Iterable[TokenLogprob], word: str) -> float:
    """The probability of all candidates that begin the word."""
    texts = ((one.token.text.strip().lower(), one.logprob) for one in candidates)
    return sum(math.exp(logprob) for text, logprob in texts if text and word.startswith(text))
