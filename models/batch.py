"""The plain types that the router sends to the models for one step, and gets back.

This module never imports torch, so the scheduler and the wire can use it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Protocol, cast

import msgspec

NonNegative = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Penalty = Annotated[float, msgspec.Meta(ge=-2.0, le=2.0)]
Bias = Annotated[float, msgspec.Meta(ge=-100.0, le=100.0)]
# Called once a step, at the moment from which other Python threads delay it least: on a CPU when
# the step starts, on a GPU when everything is launched and only the tokens are awaited.
OnLaunch = Callable[[], object]


def ignore() -> None:
    """An `OnLaunch` that does nothing."""


# whether prepared rows still are the next step, so that it may be started; called from any thread
MayStart = Callable[[], bool]


def never() -> bool:
    """A `MayStart` of rows that are only laid out."""
    return False


class DeviceLostError(RuntimeError):
    """A step failed, and all later steps will: only a new process can use the device again."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token of a request is chosen; the defaults change nothing.

    temperature 0 is greedy; top_p 1.0, top_k -1 and min_p 0.0 are off. `seed` is always set: a
    request without a seed gets a random one when it arrives, so that it repeats itself after a
    preemption. repetition_penalty counts prompt and generated tokens, presence_penalty and
    frequency_penalty only generated ones. logit_bias: (token id, bias) pairs, each id once.
    allowed_token_ids: no other token may come; empty allows all. banned_sequences: tokens that may
    not follow each other; one of length 1 never comes. The ids that end the answer are banned for
    the first min_tokens tokens. num_logprobs: how many of the likeliest tokens to report with the
    chosen token's log-probability; None reports nothing.
    `models/sampling/sampler.py` shows in which order these apply.
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
    allowed_token_ids: tuple[NonNegative, ...] = ()
    banned_sequences: tuple[tuple[NonNegative, ...], ...] = ()
    min_tokens: NonNegative = 0
    num_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """True if the choice depends on earlier tokens."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


class ImageRef(msgspec.Struct, frozen=True, kw_only=True):
    """One image without its tiles: what it is known by, and how large it is.

    aspect_ratio_id: transformers' id of the tile grid, from 1.
    content_hash: SHA-256 over the encoded bytes and everything that changes the tiles (size, mode,
    processor settings).
    """

    num_tiles: Positive
    tile_size: Positive
    aspect_ratio_id: Positive
    content_hash: bytes

    @property
    def num_bytes(self) -> int:
        """The size of its tiles: 8-bit RGB."""
        return self.num_tiles * 3 * self.tile_size**2


class ImageTiles(ImageRef, frozen=True, kw_only=True, weakref=True):
    """One image cut into tiles by the image decoder: only its real tiles.

    data: uint8 [num_tiles, 3, tile_size, tile_size], C order, as bytes.
    """

    data: bytes

    @classmethod
    def of(cls, ref: ImageRef, data: bytes | bytearray) -> ImageTiles:
        """The image `ref` with its tiles. Keeps `data`, which must not change any more."""
        return cls(
            data=cast(bytes, data),
            num_tiles=ref.num_tiles,
            tile_size=ref.tile_size,
            aspect_ratio_id=ref.aspect_ratio_id,
            content_hash=ref.content_hash,
        )

    @property
    def ref(self) -> ImageRef:
        """The image without its tiles."""
        return ImageRef(
            num_tiles=self.num_tiles,
            tile_size=self.tile_size,
            aspect_ratio_id=self.aspect_ratio_id,
            content_hash=self.content_hash,
        )


class AdapterRef(msgspec.Struct, frozen=True):
    """A LoRA adapter that a request may name.

    folder: a local folder with adapter_config.json and adapter_model.safetensors, as PEFT and
    Unsloth save them. digest: `models/lora/files.py`'s digest of both files, which identifies the
    weights; two names may have the same.
    """

    name: str
    folder: str
    digest: str


class AdapterInfo(msgspec.Struct, frozen=True):
    """What a read adapter is.

    rank: its largest. num_bytes: its weights in host memory. changes_text: it targets decoder
    layers other than the keys and values of cross-attention, so that text blocks depend on it.
    changes_images: it targets the vision encoder, the projector, or the keys and values of
    cross-attention, so that image blocks depend on it. base_model: the name in its configuration.
    """

    rank: int
    num_bytes: int
    changes_text: bool
    changes_images: bool
    base_model: str = ""


class ImageSpan(msgspec.Struct, frozen=True):
    """The token positions that may see one image: [start, end).

    end is None for the images that the prompt's last token sees: generated tokens see them too.
    Adjacent images share their end (Meta's mask).
    """

    start: NonNegative
    end: Positive | None = None

    def covers(self, position: int) -> bool:
        return self.start <= position and (self.end is None or position < self.end)


@dataclass(slots=True)
class CrossSegment:
    """Consecutive tokens of one sequence in one step that see the same images.

    block_ids: image blocks, one for each tile, of all images that they see, in prompt order; empty
    for tokens that see no image.
    """

    num_tokens: int
    block_ids: list[int]


@dataclass(slots=True, frozen=True)
class SamplingContext:
    """The earlier tokens of a request that the choice of its next token depends on.

    prompt_token_ids: in any order, each at least once; set if repetition_penalty is on.
    generated_token_ids: each once; set if any penalty is on. banned_token_ids: tokens that may not
    come yet. generated_counts: how often each of generated_token_ids was generated. Valid until the
    request gets its next token.
    """

    prompt_token_ids: Sequence[int] = ()
    generated_token_ids: Sequence[int] = ()
    banned_token_ids: Sequence[int] = ()
    generated_counts: Sequence[int] = ()


class TokenMatcher(Protocol):
    """One sequence's position in its grammar; see `models/grammar.py`."""

    @property
    def has_failed(self) -> bool: ...
    def accept(self, token_id: int) -> None: ...
    def copy(self) -> TokenMatcher: ...
    def num_allowed(self, token_ids: list[int]) -> int: ...
    def forced(self) -> list[int]: ...


class TokenLogprobs(msgspec.Struct, frozen=True):
    """The natural log-probabilities at one generated token, before any sampling parameter.

    logprob: of the chosen token. top_token_ids, top_logprobs: the requested number of likeliest
    tokens, best first. No value is below -9999.
    """

    logprob: float
    top_token_ids: list[int]
    top_logprobs: list[float]


class PromptLogprobs(msgspec.Struct, frozen=True):
    """The log-probabilities at one token of the prompt, given all tokens before it.

    rank: of this token, 1 for the likeliest; equal tokens share the better rank.
    """

    token_id: int
    logprob: float
    rank: int
    top_token_ids: list[int]
    top_logprobs: list[float]


@dataclass(slots=True, frozen=True)
class PromptTargets:
    """The prompt tokens whose log-probabilities a chunk reports.

    token_ids follow the chunk's tokens first, first + 1, ... (counted in the chunk). num_top: how
    many of the likeliest tokens to report with each.
    """

    first: int
    token_ids: list[int]
    num_top: int


@dataclass(slots=True)
class ScheduledSequence:
    """What one sequence runs in one step.

    token_ids are the tokens at positions start .. start + len - 1; block_ids cover positions
    0 .. start + len - 1 of the text pool. The segments' token counts add up to len(token_ids).
    `sampling` is None for a prefill chunk that does not reach the end of the sequence: nothing is
    sampled. `sample_index` counts the tokens generated before this one; it is the position in the
    request's random stream. `context` is None if the choice depends on the logits alone, `prompt`
    if no log-probabilities of the prompt are due, `matcher` if there is no grammar. `adapter` is
    the digest of the adapter that all its tokens use, empty for the base model; the runner must
    have read it. The last num_drafts tokens are drafts: a token is sampled in front of each of them
    too. draft_contexts: the context behind each draft; empty if `context` is None.
    """

    request_id: str
    token_ids: list[int]
    start: int
    block_ids: Sequence[int]
    segments: list[CrossSegment]
    sampling: SamplingParams | None = None
    sample_index: int = 0
    context: SamplingContext | None = None
    matcher: TokenMatcher | None = None
    prompt: PromptTargets | None = None
    adapter: str = ""
    num_drafts: int = 0
    draft_contexts: Sequence[SamplingContext | None] = ()


@dataclass(slots=True)
class ImageToEncode:
    """An image that this step encodes, wholly or in part.

    Layers begin .. end - 1 run. If end is None, all layers to the last run, and the image's
    cross-attention keys and values go to its blocks. An image with begin > 0 continues where the
    last step stopped: only one image at a time is kept between steps. adapter: the digest of the
    adapter that encodes it, empty for the base model. keep_as: its name in `StepResult.kept`.
    """

    image: ImageTiles
    block_ids: list[int]
    begin: int = 0
    end: int | None = None
    adapter: str = ""
    keep_as: str = ""


@dataclass(slots=True, frozen=True)
class BlockCopy:
    """Copy the keys and values of text block `source` to block `target`."""

    source: int
    target: int


# A step that is computed between two layers of another has at most this part of the tokens of the
# largest step, beyond those that the other leaves. The estimate of a step's memory includes it.
INSERTED_PART = 8


@dataclass(slots=True)
class StepBatch:
    """Everything one model step computes.

    copies run first: every source is read before any block is written. Then the freed blocks, which
    are listed in debug mode only, are overwritten, so that a read of them shows. loads: bytes of
    images that a former step encoded, by the blocks that get them.
    """

    sequences: list[ScheduledSequence] = field(default_factory=list)
    images: list[ImageToEncode] = field(default_factory=list)
    loads: dict[tuple[int, ...], memoryview] = field(default_factory=dict)
    copies: list[BlockCopy] = field(default_factory=list)
    freed_text_blocks: list[int] = field(default_factory=list)
    freed_image_blocks: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence.token_ids) for sequence in self.sequences)

    @property
    def adapters(self) -> set[str]:
        """The digests of all adapters that the step uses; at most `max_loras`."""
        named = {one.adapter for one in self.sequences} | {one.adapter for one in self.images}
        return named - {""}

    @property
    def finished_images(self) -> list[ImageToEncode]:
        """The images whose keys and values this step writes."""
        return [image for image in self.images if image.end is None]


@dataclass(slots=True, frozen=True)
class Accepted:
    """What a row with drafts sampled after its first token: as many as its first drafts were right.

    logprobs: one a token if requested, else empty.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs]


@dataclass(slots=True)
class StepResult:
    """What one model step sampled: request_id -> token_id.

    Has an entry for each sequence with `sampling`, and in `logprobs` for each that requested them.
    prompt_logprobs: for each sequence with `prompt`, one entry a target; None at `<|image|>`, which
    has no logit. accepted: for sequences with drafts of which some were right.
    """

    token_ids: dict[str, int]
    vision_seconds: float = 0.0
    logprobs: dict[str, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[PromptLogprobs | None]] = field(default_factory=dict)
    accepted: dict[str, Accepted] = field(default_factory=dict)
    kept: dict[str, Callable[[], memoryview]] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class PoolSizes:
    """How many blocks each pool has, and the size of a block.

    A text block has `block_size` tokens of every self-attention layer; an image block has one tile
    of every cross-attention layer. has_int8_images: these are stored in int8.
    """

    num_text_blocks: int
    num_image_blocks: int
    block_size: int
    has_int8_images: bool = False


@dataclass(slots=True, frozen=True)
class ModelInfo:
    """What the router needs to know about a loaded model.

    image_cost_tokens: how many prompt tokens take as long to compute as one image to encode.
    num_image_layers: in how many parts an image can be encoded. max_memory_bytes: of the process,
    without requests that wait. tile_bytes: of a tile in the image pool. 0 is unknown.
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
    max_memory_bytes: int = 0
    tile_bytes: int = 0
