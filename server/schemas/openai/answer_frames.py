"""What the answers of chat and text completions share: usage, prompts, the ends of chunks.

Owns the keys and their order. Knows nothing of how they are sent.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NotRequired, TypedDict

from ...generation.events import (
    Event,
    Finish,
    PromptLogprobs,
    TextDelta,
    Timings,
    ToolCallDelta,
    Usage,
)
from ...generation.preparer import PreparedGeneration
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


class ImageSeen(TypedDict):
    """An image as the model saw it. aspect_ratio_id: the checkpoint's id of the tile grid."""

    num_tiles: int
    tile_size: int
    aspect_ratio_id: int


class TimingsAnswer(TypedDict):
    """Where the time went, in seconds; ttft_s and total_s since the request's arrival.

    images_s: to fetch and decode images. queue_s: in the engine's queue. vision_s: in the vision
    encoder, 0 for cached images. prefill_s: from the first step to the first token, vision_s
    included. decode_s: from the first token to the last. images: in the order of the prompt.
    """

    images_s: float
    queue_s: float
    vision_s: float
    prefill_s: float
    decode_s: float
    ttft_s: float
    total_s: float
    images: list[ImageSeen]


def images_seen(prepared: PreparedGeneration) -> list[ImageSeen]:
    """The images of all prompts, in order."""
    return [
        {
            "num_tiles": image.num_tiles,
            "tile_size": image.tile_size,
            "aspect_ratio_id": image.aspect_ratio_id,
        }
        for request in prepared.requests
        for image in request.images
    ]


def timings_answer(timings: Timings, images: list[ImageSeen]) -> TimingsAnswer:
    """The timings with microseconds as the last digit."""
    return {
        "images_s": round(timings.images_s, 6),
        "queue_s": round(timings.queue_s, 6),
        "vision_s": round(timings.vision_s, 6),
        "prefill_s": round(timings.prefill_s, 6),
        "decode_s": round(timings.decode_s, 6),
        "ttft_s": round(timings.ttft_s, 6),
        "total_s": round(timings.total_s, 6),
        "images": images,
    }


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
    timings: NotRequired[TimingsAnswer]
    obfuscation: NotRequired[str]


@dataclass(slots=True, kw_only=True)
class OpenAIAnswers(StreamedAnswers):
    """The answers to one request; all have the same id and time.

    include_usage: a stream ends with a chunk of the usage. running_usage: every chunk has the
    usage so far. is_obfuscated: every chunk has random characters. prompts: token ids of each
    prompt, if the answers report them. has_token_ids: they report those of their own tokens too.
    has_prompt_ids: each choice has those of its prompt. images: those of the prompts, if the answer
    has timings; a stream has them in its last chunk.
    """

    has_done: ClassVar[bool] = True

    model: str
    include_usage: bool = False
    is_obfuscated: bool = False
    running_usage: RunningUsage | None = None
    prompts: Sequence[list[int]] | None = None
    images: list[ImageSeen] | None = None
    has_token_ids: bool = False
    has_prompt_ids: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def count(self, event: Event) -> None:
        """Count the tokens of an event, before its chunks are made."""
        if self.running_usage is not None:
            self.running_usage.add(event)

    @property
    def has_end(self) -> bool:
        """A stream ends with a chunk without choices: of the usage, the timings or both."""
        return self.include_usage or self.images is not None

    def add_timings(self, answer: Any, timings: Timings) -> None:
        """Add the timings to an answer or a last chunk, if they were requested."""
        if self.images is not None:
            answer["timings"] = timings_answer(timings, self.images)

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
    images: list[ImageSeen] | None
    has_token_ids: bool
    has_prompt_ids: bool


def frames_of(body: SharedFields, prepared: PreparedGeneration) -> FrameOptions:
    """The options that a body asks for."""
    prompts = prepared.prompts
    options = body.stream_options or StreamOptions()
    running_usage = None
    if options.continuous_usage_stats:
        running_usage = RunningUsage(sum(map(len, prompts)))
    return {
        "model": body.model,
        "include_usage": bool(options.include_usage),
        "is_obfuscated": bool(options.include_obfuscation),
        "running_usage": running_usage,
        "images": images_seen(prepared) if body.return_timings else None,
        "prompts": prompts if body.return_token_ids or body.return_prompt_token_ids else None,
        "has_token_ids": bool(body.return_token_ids),
        "has_prompt_ids": bool(body.return_prompt_token_ids),
    }
