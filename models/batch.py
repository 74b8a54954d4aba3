"""The plain types that cross between the router and the models.

Owns what one model step is told and what it answers. Knows no tensor: this
module never imports torch, so the scheduler and the wire can use it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Protocol

import msgspec

NonNegative = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Penalty = Annotated[float, msgspec.Meta(ge=-2.0, le=2.0)]
Bias = Annotated[float, msgspec.Meta(ge=-100.0, le=100.0)]
# Called once a step, from when on Python of other threads costs the step the least: on a CPU when
# it begins, on a GPU when all is launched and its tokens are waited for.
OnLaunch = Callable[[], None]


def ignore() -> None:
    """An `OnLaunch` that nobody waits for."""


class DeviceLostError(RuntimeError):
    """A step failed and so will all others: only a new process can use the device again."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token of a request is chosen; the defaults change nothing.

    temperature 0 is greedy; top_p 1.0, top_k -1 and min_p 0.0 are off. `seed` is
    always set: a request without one is given a random one when it arrives, so
    that a preempted request repeats itself. repetition_penalty counts the prompt
    and what was generated, presence and frequency what was generated. logit_bias:
    (token id, bias) pairs, each id once. The ids that end the answer are banned
    for the first min_tokens tokens. num_logprobs: how many of the likeliest tokens
    are told beside the chosen one's log-probability; None tells of none.
    `models/sampling/sampler.py` has the order of these.
    """

    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=2.0)] = 1.0
    top_p: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, msgspec.Meta(ge=-1)] = -1
    seed: int = 0
    min_p: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0.0, le=2.0)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: tuple[tuple[NonNegative, Bias], ...] = ()
    min_tokens: NonNegative = 0
    num_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """True if the choice depends on which tokens the text already holds."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


class ImageTiles(msgspec.Struct, frozen=True, kw_only=True):
    """One image as the decoder cut it: only its real tiles, 8-bit RGB.

    data: uint8 [num_tiles, 3, tile_size, tile_size], C order, as bytes.
    aspect_ratio_id: transformers' id of the tile grid, from 1.
    content_hash: SHA-256 over the encoded bytes and whatever changes the tiles
    (size, mode, processor settings).
    """

    data: bytes
    num_tiles: Positive
    tile_size: Positive
    aspect_ratio_id: Positive
    content_hash: bytes


class ImageSpan(msgspec.Struct, frozen=True):
    """The token positions that may see one image: [start, end).

    end is None for the images that the prompt's last token sees: generated
    tokens go on seeing them. Adjacent images share their end (Meta's mask).
    """

    start: NonNegative
    end: Positive | None = None

    def covers(self, position: int) -> bool:
        return self.start <= position and (self.end is None or position < self.end)


@dataclass(slots=True)
class CrossSegment:
    """Consecutive tokens of one sequence in one step that see the same images.

    block_ids: image blocks (one a tile) of all images they see, in prompt
    order; empty for tokens that may see no image.
    """

    num_tokens: int
    block_ids: list[int]


@dataclass(slots=True, frozen=True)
class SamplingContext:
    """What the choice of a request's next token needs to know of its text so far.

    prompt_token_ids, in any order and each at least once, are told where
    repetition_penalty is on; generated_token_ids where any penalty is;
    banned_token_ids are those that may not come yet.
    """

    prompt_token_ids: Sequence[int] = ()
    generated_token_ids: Sequence[int] = ()
    banned_token_ids: Sequence[int] = ()


class TokenMatcher(Protocol):
    """Where one sequence stands in its grammar; see `models/grammar.py`."""

    @property
    def has_failed(self) -> bool: ...
    def accept(self, token_id: int) -> None: ...
    def copy(self) -> TokenMatcher: ...


class TokenLogprobs(msgspec.Struct, frozen=True):
    """The natural log-probabilities at one generated token, before any sampling parameter.

    logprob: of the chosen token. top_token_ids, top_logprobs: the likeliest
    tokens, best first, as many as were asked for. None is below -9999.
    """

    logprob: float
    top_token_ids: list[int]
    top_logprobs: list[float]


class PromptLogprobs(msgspec.Struct, frozen=True):
    """The same at one token of the prompt, given all that stands before it.

    rank: of this token among all, the likeliest is 1; equals share the better rank.
    """

    token_id: int
    logprob: float
    rank: int
    top_token_ids: list[int]
    top_logprobs: list[float]


@dataclass(slots=True, frozen=True)
class PromptTargets:
    """Which tokens of the prompt a chunk is to tell the log-probabilities of.

    token_ids are what follows the chunk's tokens first, first + 1, ... (counted in
    the chunk). num_top: how many of the likeliest tokens are told beside each.
    """

    first: int
    token_ids: list[int]
    num_top: int


@dataclass(slots=True)
class ScheduledSequence:
    """What one sequence runs in one step.

    token_ids are the tokens at positions start .. start + len - 1; block_ids
    cover positions 0 .. start + len - 1 of the text pool. The segments' token
    counts add up to len(token_ids). `sampling` is None for a prefill chunk that
    does not reach the end of the sequence: nothing is sampled for it.
    `sample_index` counts the tokens generated before this one (0 for the first);
    it picks the place in the request's own random stream. `context` is None where
    the choice depends on the logits alone, `prompt` where no log-probabilities of
    the prompt are due, `matcher` where no grammar says which tokens may come.
    """

    request_id: str
    token_ids: list[int]
    start: int
    block_ids: list[int]
    segments: list[CrossSegment]
    sampling: SamplingParams | None = None
    sample_index: int = 0
    context: SamplingContext | None = None
    matcher: TokenMatcher | None = None
    prompt: PromptTargets | None = None


@dataclass(slots=True)
class ImageToEncode:
    """An image that is encoded in this step, or a part of it.

    Its layers begin .. end - 1 run; where end is None all to the last, and its cross-attention
    keys and values go to its blocks. Who begins in the middle goes on where the last step that
    encoded a part has ended: one image at a time is kept between steps.
    """

    image: ImageTiles
    block_ids: list[int]
    begin: int = 0
    end: int | None = None

    @property
    def is_whole(self) -> bool:
        """All of its layers run in this step."""
        return self.begin == 0 and self.end is None


@dataclass(slots=True, frozen=True)
class BlockCopy:
    """A text block whose keys and values another is to begin with."""

    source: int
    target: int


@dataclass(slots=True)
class StepBatch:
    """Everything one model step computes.

    copies come first of all: every source is read before any block is written. Then the
    freed blocks are poisoned, which are named in a debug mode only: nobody may read
    what they held.
    """

    sequences: list[ScheduledSequence] = field(default_factory=list)
    images: list[ImageToEncode] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    freed_text_blocks: list[int] = field(default_factory=list)
    freed_image_blocks: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence.token_ids) for sequence in self.sequences)

    @property
    def finished_images(self) -> list[ImageToEncode]:
        """Those of the images whose keys and values this step writes."""
        return [image for image in self.images if image.end is None]


@dataclass(slots=True)
class StepResult:
    """What one model step sampled: request_id -> token_id.

    Holds an entry for each sequence of the batch whose `sampling` was set, and in
    `logprobs` for those that asked for them. prompt_logprobs: for each sequence with
    `prompt` one entry a target, None at `<|image|>`, which has no logit.
    """

    token_ids: dict[str, int]
    vision_seconds: float = 0.0
    logprobs: dict[str, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[PromptLogprobs | None]] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class PoolSizes:
    """How many blocks each pool has, and how much one block holds.

    A text block holds `block_size` tokens of every self-attention layer; an
    image block holds one tile of every cross-attention layer.
    """

    num_text_blocks: int
    num_image_blocks: int
    block_size: int


@dataclass(slots=True, frozen=True)
class ModelInfo:
    """What the router must know of a loaded model.

    image_cost_tokens: how many prompt tokens take as long to compute as one image to encode; 0
    where that is not known. num_image_layers: the parts that an image can be encoded in.
    """

    vocab_size: int
    max_model_len: int
    max_num_tiles: int
    tile_size: int
    device: str
    dtype: str
    pools: PoolSizes
    image_cost_tokens: int = 0
    num_image_layers: int = 1
