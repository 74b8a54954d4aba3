"""The plain types that cross between the router and the models.

Owns what one model step is told and what it answers. Knows no tensor: this
module never imports torch, so the scheduler and the wire can use it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import msgspec

NonNegative = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token of a request is chosen.

    temperature 0 is greedy; top_p 1.0 and top_k -1 are off. `seed` is always
    set: a request without one is given a random one when it arrives, so that a
    preempted request repeats itself.
    """

    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=2.0)] = 1.0
    top_p: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, msgspec.Meta(ge=-1)] = -1
    seed: int = 0

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


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


@dataclass(slots=True)
class ScheduledSequence:
    """What one sequence runs in one step.

    token_ids are the tokens at positions start .. start + len - 1; block_ids
    cover positions 0 .. start + len - 1 of the text pool. The segments' token
    counts add up to len(token_ids). `sampling` is None for a prefill chunk that
    does not reach the end of the sequence: nothing is sampled for it.
    `sample_index` counts the tokens generated before this one (0 for the first);
    it picks the place in the request's own random stream.
    """

    request_id: str
    token_ids: list[int]
    start: int
    block_ids: list[int]
    segments: list[CrossSegment]
    sampling: SamplingParams | None = None
    sample_index: int = 0


@dataclass(slots=True)
class ImageToEncode:
    """An image whose cross-attention keys and values are due in this step."""

    image: ImageTiles
    block_ids: list[int]


@dataclass(slots=True)
class StepBatch:
    """Everything one model step computes."""

    sequences: list[ScheduledSequence] = field(default_factory=list)
    images: list[ImageToEncode] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence.token_ids) for sequence in self.sequences)


@dataclass(slots=True)
class StepResult:
    """What one model step sampled: request_id -> token_id.

    Holds an entry for each sequence of the batch whose `sampling` was set.
    """

    token_ids: dict[str, int]
    vision_seconds: float = 0.0


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
    """What the router must know of a loaded model."""

    vocab_size: int
    max_model_len: int
    max_num_tiles: int
    tile_size: int
    device: str
    dtype: str
    pools: PoolSizes
