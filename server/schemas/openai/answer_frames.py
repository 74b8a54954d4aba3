"""What the answers of chat and text completions share: usage, prompts, the ends of chunks.

Owns the keys and their order. Knows nothing of how they are sent.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NotRequired, TypedDict

from ...generation.events import (
    Event,
    Finish,
    PromptLogprobs,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from ...generation.token_text import PromptCandidate
from ..sampling import SharedFields, StreamOptions
from ..streamed_answers import StreamedAnswers


class PromptToken(TypedDict):
    """A candidate token at one position of the prompt. rank: 1 for the likeliest token."""

    logprob: float
    rank: int
    decoded_token: str


# One entry for each token of the prompt: its candidates by token id.
PromptCandidates = list[dict[str, PromptToken] | None]


class PromptDetails(TypedDict):
    """cached_tokens: tokens of the prompt read from the cache."""

    cached_tokens: int


class UsageCounts(TypedDict):
    """An image counts as one token. prompt_tokens_details: only if some tokens were cached."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: NotRequired[PromptDetails]


def usage_counts(usage: Usage) -> UsageCounts:
    """Tokens read and generated, and the cached ones if there are any."""
    counts: UsageCounts = {
        "prompt_tokens": usage.prompt_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "completion_tokens": usage.completion_tokens,
    }
    if usage.cached_tokens:
        counts["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    return counts


@dataclass(slots=True)
class RunningUsage:
    """The usage of a stream so far, summed over its choices."""

    prompt_tokens: int
    _by_choice: dict[int, int] = field(default_factory=dict)

    def add(self, event: Event) -> None:
        """Count the tokens that an event reports."""
        if isinstance(event, TextDelta | ToolCallDelta):
            before = self._by_choice.get(event.choice, 0)
            self._by_choice[event.choice] = max(before, event.num_tokens)
        elif isinstance(event, Finish):
            self._by_choice[event.choice] = event.usage.completion_tokens

    @property
    def counts(self) -> UsageCounts:
        """The usage, without cached tokens."""
        return usage_counts(Usage(self.prompt_tokens, sum(self._by_choice.values())))


def obfuscation(text: str) -> str:
    """Random characters that make a chunk's text a multiple of 32 bytes long, 1 to 32 of them."""
    return secrets.token_urlsafe(24)[: 32 - len(text.encode()) % 32]


def prompt_candidates(
    logprobs: PromptLogprobs | None, num_top: int | None = None
) -> PromptCandidates | None:
    """For each token of the prompt, its candidates by token id, as vLLM returns them.

    num_top: keep only this many of the likeliest candidates; None keeps all.
    """
    if logprobs is None:
        return None
    return [None if entry is None else _by_token_id(entry, num_top) for entry in logprobs.entries]


def _by_token_id(entry: tuple[PromptCandidate, ...], num_top: int | None) -> dict[str, PromptToken]:
    # The prompt's own token comes first, whatever its rank.
    others = (token for token in entry[1:] if num_top is None or token.rank <= num_top)
    return {
        str(token.token_id): {
            "logprob": token.logprob,
            "rank": token.rank,
            "decoded_token": token.text,
        }
        for token in (entry[0], *others)
    }


class OpenAIChunk(TypedDict):
    """What the chunks of both streams share. id, created: the same in all of a stream."""

    id: str
    created: int
    model: str
    usage: NotRequired[UsageCounts | None]
    obfuscation: NotRequired[str]


@dataclass(slots=True, kw_only=True)
class OpenAIAnswers(StreamedAnswers):
    """The answers to one request; all have the same id and time.

    include_usage: a stream ends with a chunk of the usage. running_usage: every chunk has the
    usage so far. is_obfuscated: every chunk has random characters. prompts: token ids of each
    prompt, if the answers have those of tokens.
    """

    has_done: ClassVar[bool] = True

    model: str
    include_usage: bool = False
    is_obfuscated: bool = False
    running_usage: RunningUsage | None = None
    prompts: Sequence[list[int]] | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def count(self, event: Event) -> None:
        """Count the tokens of an event, before its chunks are made."""
        if self.running_usage is not None:
            self.running_usage.add(event)

    def complete(self, chunk: OpenAIChunk, text: str) -> None:
        """Add what every chunk ends with. text: the chunk's."""
        if self.running_usage is not None:
            chunk["usage"] = self.running_usage.counts
        elif self.include_usage:
            chunk["usage"] = None
        if self.is_obfuscated:
            chunk["obfuscation"] = obfuscation(text)


class FrameOptions(TypedDict):
    """What a body sets for all chunks: the arguments of OpenAIAnswers."""

    model: str
    include_usage: bool
    is_obfuscated: bool
    running_usage: RunningUsage | None
    prompts: Sequence[list[int]] | None


def frames_of(body: SharedFields, prompts: Sequence[list[int]]) -> FrameOptions:
    """The options that a body asks for. prompts: their token ids."""
    options = body.stream_options or StreamOptions()
    running_usage = None
    if options.continuous_usage_stats:
        running_usage = RunningUsage(sum(map(len, prompts)))
    return {
        "model": body.model,
        "include_usage": bool(options.include_usage),
        "is_obfuscated": bool(options.include_obfuscation),
        "running_usage": running_usage,
        "prompts": prompts if body.return_token_ids else None,
    }
