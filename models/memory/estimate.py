"""Estimates a model's memory by arithmetic: its weights, and one step's activations.

Needed before the model is loaded, and on a CPU, where the largest step takes minutes to run; on a
GPU `peak_step.py` measures it instead.

A step's peak is that of its largest phase, plus what stays from earlier phases:

    vision    the pixels, the encoder's taps, one block's work
    text      the images' projected states, the plans' slots and masks, one layer's work, the keys
              gathered for one bucket of attention; or, between two layers, all of a small step
    sampling  the hidden states, logits in float32, weights in float64
    prompt    log-probabilities of PROMPT_ROWS rows at a time

Where a CPU multiplies bfloat16 states in float32, each phase has those of its largest product too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import MllamaConfig

from ..attention.sdpa import MAX_BUCKET_KEYS, MAX_MASKED_QUERIES
from ..batch import INSERTED_PART
from ..sampling.logprobs import PROMPT_ROWS
from ..vision.encoder import images_per_pass
from ..vision.image_cost import kv_width
from ..vision.layered_encoder import padded_patches
from ..weights.device_map import EMBEDDING, HEAD, PROJECTOR, TEXT, VISION
from ..weights.formats.coded_tensor import CodedTensor
from ..weights.formats.safetensors_headers import StoredTensor
from ..weights.quantization import is_quantized, quantized_bytes
from ..weights.tensor_loader import WHOLE, RankShare
from .peak_step import StepLimits

_FLOAT32, _FLOAT64, _INT64 = 4, 8, 8
# for what the sums omit and what allocators waste
_SMALL_TENSORS = 1.1


@dataclass(slots=True, frozen=True)
class PeakBytes:
    """One step's peak in each phase, with everything that is alive then."""

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
    """Bytes of each part's weights on one rank, in the order of `parts`."""
    sizes = dict.fromkeys(parts, 0)
    for name, tensor in tensors.items():
        part = next((part for part in parts if name.startswith(f"{part}.")), None)
        if part is None:  # the file has tensors that the model does not use
            continue
        size = tensor.num_elements * dtype.itemsize
        if isinstance(tensor, CodedTensor) and is_quantized(name):
            size = tensor.kept_bytes
        elif quantize is not None and is_quantized(name):
            size = quantized_bytes(quantize, tensor.shape)
        sizes[part] += size // share.size if name.rpartition(".")[0] in share.sides else size
    return sizes


def by_kind(sizes: Mapping[str, int]) -> dict[str, int]:
    """The bytes of parts grouped for messages: vision, decoder, embedding and head."""
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


def peak_bytes(
    config: MllamaConfig,
    limits: StepLimits,
    dtype: torch.dtype,
    *,
    is_widened: bool = False,
    has_inserted: bool = False,
) -> PeakBytes:
    """The activations of `peak_step.peak_batch`, with attention by the reference backend.

    is_widened: the device computes products in float32 (`kernels/float32_products.py`).
    has_inserted: a small step may be computed between two layers of another, as on a CPU.
    """
    parts = config.vision_config, config.text_config, limits, dtype.itemsize
    shape = _Shape(*parts, is_widened=is_widened, has_inserted=has_inserted)
    phases = (_vision_bytes(shape), _text_bytes(shape), _sampling_bytes(shape))
    vision, text, sampling = (int(phase * _SMALL_TENSORS) for phase in phases)
    return PeakBytes(vision, text, sampling)


@dataclass(slots=True, frozen=True)
class _Shape:
    """The sizes in the sums.

    vision, text: the model's configurations
    size: bytes of a value
    is_widened: products of bfloat16 states are computed in float32
    has_inserted: another step may be computed between two layers
    """

    vision: Any
    text: Any
    limits: StepLimits
    size: int
    is_widened: bool
    has_inserted: bool

    @property
    def num_patches(self) -> int:
        return int((self.vision.image_size // self.vision.patch_size) ** 2 + 1)

    @property
    def kv_width(self) -> int:
        return kv_width(self.text)

    @property
    def num_rows(self) -> int:
        return min(self.limits.max_num_seqs, self.limits.max_num_batched_tokens)

    @property
    def chunk(self) -> int:
        """Tokens of the chunk beside one token of each other sequence."""
        tokens = self.limits.max_num_batched_tokens - self.num_rows + 1
        return min(tokens, self.limits.max_model_len)

    @property
    def num_chunk_parts(self) -> int:
        """Rows that the chunk is cut into; 1 without a past, whose mask is no tensor."""
        has_past = self.chunk < self.limits.max_model_len
        return -(-self.chunk // MAX_MASKED_QUERIES) if has_past else 1

    @property
    def image_patches(self) -> int:
        """Keys of one image of the most tiles."""
        return int(self.vision.max_num_tiles * self.num_patches)

    @property
    def vision_states(self) -> int:
        """Bytes of all images' projected states."""
        num_states = self.limits.max_num_batched_images * self.image_patches
        return int(num_states * self.text.hidden_size * self.size)

    def product(self, num_rows: int, num_in: int, num_out: int) -> int:
        """Bytes in float32 while rows [num_rows, num_in] become [num_rows, num_out]."""
        return num_rows * (num_in + num_out) * _FLOAT32 if self.is_widened else 0


def _vision_bytes(s: _Shape) -> int:
    vision = s.vision
    num_images = min(s.limits.max_num_batched_images, images_per_pass(vision))
    tokens = num_images * vision.max_num_tiles * padded_patches(s.num_patches)
    state = tokens * vision.hidden_size * s.size
    pixels = num_images * vision.max_num_tiles * 3 * vision.image_size**2 * (_FLOAT32 + s.size)
    num_taps = len(vision.intermediate_layers_indices)
    attention = 6 * state
    mlp = 2 * state + 2 * tokens * vision.intermediate_size * s.size
    mlp += s.product(tokens, vision.hidden_size, vision.intermediate_size)
    # the taps stacked, then joined to the last state
    joined = (2 * num_taps + 2) * state + s.vision_states
    kept = (num_taps + 2) * state
    return int(max(kept + max(attention, mlp, joined), pixels + 3 * state) + s.vision_states)


def _text_bytes(s: _Shape) -> int:
    num_tokens, hidden = s.limits.max_num_batched_tokens, s.text.hidden_size
    kept = s.vision_states + 2 * num_tokens * s.size * hidden + _plan_bytes(s)
    return int(kept + max(_layer_bytes(s), _inserted_bytes(s)))


def _inserted_bytes(s: _Shape) -> int:
    """All of a step of one sequence, without log-probabilities of its prompt, between two layers.

    See `execution/between_layers.py`.
    """
    num_tokens = s.limits.max_num_batched_tokens // INSERTED_PART
    if not num_tokens or not s.has_inserted:
        return 0
    limits = replace(
        s.limits, max_num_seqs=1, max_num_batched_tokens=num_tokens, max_num_batched_images=0
    )
    one = replace(s, limits=limits)
    states = 2 * num_tokens * one.size * one.text.hidden_size
    return max(states + _plan_bytes(one) + _layer_bytes(one), states + _sampled_bytes(one))


def _layer_bytes(s: _Shape) -> int:
    num_tokens, hidden = s.limits.max_num_batched_tokens, s.text.hidden_size
    row = num_tokens * s.size
    norm = num_tokens * hidden * 3 * _FLOAT32
    # gate and up in one product, the activated gate, then their product
    mlp = 2 * row * hidden + max(norm, 4 * row * s.text.intermediate_size)
    mlp += s.product(num_tokens, hidden, 2 * s.text.intermediate_size)
    gathered = 2 * _bucket_keys(s) * s.kv_width * s.size
    attention = 8 * row * hidden + 4 * row * s.kv_width + gathered
    new_keys = s.limits.max_num_batched_images * s.image_patches * s.kv_width
    cross = 3 * row * hidden + new_keys * (3 * s.size + 3 * _FLOAT32)
    return int(max(mlp, attention, cross))


def _bucket_keys(s: _Shape) -> int:
    """Keys of the largest bucket: of one row, or of several shorter rows."""
    length = s.limits.max_model_len
    rows = max(s.num_chunk_parts, s.num_rows - 1)
    several = max(rows * length, s.num_rows * s.image_patches)
    images = s.limits.max_num_batched_images * s.image_patches
    return max(length, images, min(MAX_BUCKET_KEYS, several))


def _plan_bytes(s: _Shape) -> int:
    """Slots of every row's keys, and the masks of a long chunk behind a past."""
    length = s.limits.max_model_len
    slots = _INT64 * length * (s.num_chunk_parts + s.num_rows - 1)
    slots += _INT64 * s.image_patches * (s.limits.max_num_batched_images + s.num_rows)
    if s.chunk >= length:
        return slots  # no past, no mask
    # the last mask exists twice as bool beside its converted copy
    bools = 2 * min(s.chunk, MAX_MASKED_QUERIES) * length
    return slots + s.chunk * length * s.size + bools


def _sampling_bytes(s: _Shape) -> int:
    num_tokens, vocab_size = s.limits.max_num_batched_tokens, s.text.vocab_size
    hidden = num_tokens * s.text.hidden_size * s.size
    prompt_rows = min(PROMPT_ROWS, num_tokens)
    prompt = prompt_rows * vocab_size * (s.size + 3 * _FLOAT32)
    return int(hidden + s.vision_states + max(_sampled_bytes(s), prompt))


def _sampled_bytes(s: _Shape) -> int:
    """Logits, their copies and log-probabilities; then weights, and what min-p drops."""
    return int(s.num_rows * s.text.vocab_size * (s.size + 5 * _FLOAT32 + 2 * _FLOAT64))
