"""What the answers of OpenAI's APIs share: the usage and what is told of a prompt.

Owns keys and their order. Knows nothing of how they are sent.
"""

from __future__ import annotations

import secrets
from typing import NotRequired, TypedDict

from ..generation.answer_stream import PromptTold, Usage
from ..generation.token_text import PromptCandidate


class PromptToken(TypedDict):
    """A candidate for one place of the prompt. rank: 1 for the likeliest token."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptToken] | None]


class PromptDetails(TypedDict):
    """cached_tokens: those of the prompt that were not computed again."""

    cached_tokens: int


class UsageCounts(TypedDict):
    """An image counts as one token. prompt_tokens_details: only where the cache had some."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: NotRequired[PromptDetails]


def usage_counts(usage: Usage) -> UsageCounts:
    """What was read and written, the cache's part where there is one."""
    counts: UsageCounts = {
        "prompt_tokens": usage.prompt_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "completion_tokens": usage.completion_tokens,
    }
    if usage.cached_tokens:
        counts["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    return counts


def obfuscation(text: str) -> str:
    """Random characters that make a chunk's text a multiple of 32 bytes long, 1 to 32 of them."""
    return secrets.token_urlsafe(24)[: 32 - len(text.encode()) % 32]


def prompt_logprobs(told: PromptTold | None, num_top: int | None = None) -> PromptLogprobs | None:
    """vLLM's form: for each token of the prompt its candidates by their ids.

    num_top: how many of the likeliest, where more were told; None for all.
    """
    if told is None:
        return None
    return [entry if entry is None else _by_token_id(entry, num_top) for entry in told.entries]


def _by_token_id(entry: tuple[PromptCandidate, ...], num_top: int | None) -> dict[str, PromptToken]:
    # What stands there comes first, whatever its rank.
    told = [entry[0], *(one for one in entry[1:] if num_top is None or one.rank <= num_top)]
    return {
        str(one.token_id): {"logprob": one.logprob, "rank": one.rank, "decoded_token": one.text}
        for one in told
    }
