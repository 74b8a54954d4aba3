"""What a model takes in memory, by arithmetic: its weights, and one step's activations.

Owns the sums. Knows nothing of devices or of what is free. Needed where the model is not there yet,
and on a CPU, where running the largest step would take minutes; a GPU measures it instead.

A step's peak is that of its largest phase, beside what stays from earlier ones:

    vision    the pixels, the encoder's state after every block (transformers keeps all), the mask
              of all tiles by all tiles, one block's work
    text      the pictures' projected states, the plans' slots and masks, one layer's work, the keys
              gathered for one bucket of attention
    sampling  the hidden states, logits in float32, weights in float64 and their sorted copies
    prompt    log-probabilities of PROMPT_ROWS rows at a time
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import MllamaConfig

from ..attention.sdpa import MAX_BUCKET_KEYS, MAX_MASKED_QUERIES
from ..sampling.logprobs import PROMPT_ROWS
from ..vision.encoder import MAX_IMAGES_PER_PASS
from ..vision.layered_encoder import padded_patches
from ..weights.device_map import EMBEDDING, HEAD, PROJECTOR, TEXT, VISION
from ..weights.quantization import is_quantized, quantized_bytes
from ..weights.safetensors_headers import StoredTensor
from ..weights.tensor_loader import WHOLE, RankShare
from .peak_step import StepLimits

_FLOAT32, _FLOAT64, _INT64 = 4, 8, 8
# what the sums leave out, and what allocators lose
_SMALL_TENSORS = 1.1


@dataclass(slots=True, frozen=True)
class PeakBytes:
    """One step's activations by phase, each with all that is alive beside it."""

    vision: int
    text: int
    sampling: int

    @property
    def most(self) -> int:
        return max(self.vision, self.text, self.sampling)


def part_bytes(
    parts: list[str],
    tensors: Mapping[str, StoredTensor],
    dtype: torch.dtype,
    quantize: str | None = None,
    share: RankShare = WHOLE,
) -> dict[str, int]:
    """Bytes of each part's weights as a rank will hold them, in the order of `parts`."""
    sizes = dict.fromkeys(parts, 0)
    for name, tensor in tensors.items():
        part = next((part for part in parts if name.startswith(f"{part}.")), None)
        if part is None:  # a file may hold more than the model takes
            continue
        size = tensor.num_elements * dtype.itemsize
        if quantize is not None and is_quantized(name):
            size = quantized_bytes(quantize, tensor.shape)
        sizes[part] += size // share.size if name.rpartition(".")[0] in share.sides else size
    return sizes


def by_kind(sizes: Mapping[str, int]) -> dict[str, int]:
    """Parts' bytes as an operator thinks of them: vision, decoder, embedding and head."""
    kinds = {"vision": 0, "decoder": 0, "embedding and head": 0}
    for part, size in sizes.items():
        if part in (VISION, PROJECTOR):
            kinds["vision"] += size
        elif part in (EMBEDDING, HEAD):
            kinds["embedding and head"] += size
        else:
            assert part.startswith(TEXT), part
            kinds["decoder"] += size
    return kinds


def peak_bytes(config: MllamaConfig, limits: StepLimits, dtype: torch.dtype) -> PeakBytes:
    """The activations of `peak.peak_batch`, attention by the reference backend."""
    shape = _Shape.of(config, limits, dtype)
    phases = (_vision_bytes(shape), _text_bytes(shape), _sampling_bytes(shape))
    vision, text, sampling = (int(phase * _SMALL_TENSORS) for phase in phases)
    return PeakBytes(vision, text, sampling)


@dataclass(slots=True, frozen=True)
class _Shape:
    """The sizes that the sums are of; `size` is the compute type's bytes."""

    size: int
    # vision
    num_images: int
    images_a_pass: int
    tile_values: int
    max_num_tiles: int
    num_patches: int
    vision_hidden: int
    vision_inner: int
    num_blocks: int
    num_taps: int
    # text
    num_tokens: int
    num_rows: int
    length: int
    hidden: int
    inner: int
    kv_width: int
    vocab_size: int

    @classmethod
    def of(cls, config: MllamaConfig, limits: StepLimits, dtype: torch.dtype) -> _Shape:
        vision: Any = config.vision_config
        text: Any = config.text_config
        return cls(
            size=dtype.itemsize,
            num_images=limits.max_num_batched_images,
            images_a_pass=min(limits.max_num_batched_images, MAX_IMAGES_PER_PASS),
            tile_values=3 * vision.image_size**2,
            max_num_tiles=vision.max_num_tiles,
            num_patches=(vision.image_size // vision.patch_size) ** 2 + 1,
            vision_hidden=vision.hidden_size,
            vision_inner=vision.intermediate_size,
            num_blocks=vision.num_hidden_layers + vision.num_global_layers,
            num_taps=len(vision.intermediate_layers_indices),
            num_tokens=limits.max_num_batched_tokens,
            num_rows=min(limits.max_num_seqs, limits.max_num_batched_tokens),
            length=limits.max_model_len,
            hidden=text.hidden_size,
            inner=text.intermediate_size,
            kv_width=text.num_key_value_heads * (text.hidden_size // text.num_attention_heads),
            vocab_size=text.vocab_size,
        )

    @property
    def chunk(self) -> int:
        """Tokens of the one chunk beside single tokens of the other sequences."""
        return min(self.num_tokens - self.num_rows + 1, self.length)

    @property
    def num_chunk_parts(self) -> int:
        """Rows that the chunk is cut into; one without a past, as its mask is no tensor then."""
        return -(-self.chunk // MAX_MASKED_QUERIES) if self.chunk < self.length else 1

    @property
    def vision_states(self) -> int:
        """Bytes of all pictures' projected states."""
        return self.num_images * self.max_num_tiles * self.num_patches * self.hidden * self.size


def _vision_bytes(s: _Shape) -> int:
    padded = s.max_num_tiles * padded_patches(s.num_patches)
    tokens = s.images_a_pass * padded
    state = tokens * s.vision_hidden * s.size
    pixels = s.images_a_pass * s.max_num_tiles * s.tile_values * (_FLOAT32 + s.size)
    mask = s.images_a_pass * padded**2 * s.size
    # SDPA of half precision on a CPU takes its mask in float32
    mask_copy = s.images_a_pass * padded**2 * _FLOAT32 if s.size < _FLOAT32 else 0
    kept = (s.num_blocks + 2) * state + mask + pixels
    attention = 6 * state + mask_copy
    mlp = 2 * state + 2 * tokens * s.vision_inner * s.size
    # the taps stacked and cut, then joined to the last state and picked by tile
    joined = (3 * s.num_taps + 2) * state + s.vision_states
    return max(kept + max(attention, mlp, joined), pixels + 2 * mask) + s.vision_states


def _text_bytes(s: _Shape) -> int:
    row = s.num_tokens * s.size
    norm = s.num_tokens * s.hidden * 3 * _FLOAT32
    # gate and up in one product, the one activated, then both multiplied
    mlp = 2 * row * s.hidden + max(norm, 4 * row * s.inner)
    gathered = 2 * _bucket_keys(s) * s.kv_width * s.size
    attention = 8 * row * s.hidden + 4 * row * s.kv_width + gathered
    new_keys = s.num_images * s.max_num_tiles * s.num_patches * s.kv_width
    cross = 3 * row * s.hidden + new_keys * (3 * s.size + 3 * _FLOAT32)
    return s.vision_states + 2 * row * s.hidden + _plan_bytes(s) + max(mlp, attention, cross)


def _bucket_keys(s: _Shape) -> int:
    """Keys of the largest bucket: one row's, or as many shorter rows' as a bucket takes."""
    an_image = s.max_num_tiles * s.num_patches
    rows = max(s.num_chunk_parts, s.num_rows - 1)
    several = max(rows * s.length, s.num_rows * an_image)
    return max(s.length, s.num_images * an_image, min(MAX_BUCKET_KEYS, several))


def _plan_bytes(s: _Shape) -> int:
    """Slots of every row's keys, and the masks of a long chunk behind a past."""
    slots = _INT64 * s.length * (s.num_chunk_parts + s.num_rows - 1)
    slots += _INT64 * s.max_num_tiles * s.num_patches * (s.num_images + s.num_rows)
    if s.chunk >= s.length:
        return slots  # no past, no mask
    # the last mask twice as bool beside what it becomes
    bools = 2 * min(s.chunk, MAX_MASKED_QUERIES) * s.length
    return slots + s.chunk * s.length * s.size + bools


def _sampling_bytes(s: _Shape) -> int:
    hidden = s.num_tokens * s.hidden * s.size
    # logits, their copies and log-probabilities; then weights, in order, with ids, twice cut
    sampled = s.num_rows * s.vocab_size * (s.size + 4 * _FLOAT32 + 10 * _FLOAT64)
    prompt_rows = min(PROMPT_ROWS, s.num_tokens)
    prompt = prompt_rows * s.vocab_size * (s.size + 3 * _FLOAT32)
    return hidden + s.vision_states + max(sampled, prompt)
