"""What a step costs at least, and how fast this machine is: products, and reads of memory.

Owns the arithmetic from a model's configuration to operations and bytes, and small measurements.
Knows nothing of runners or of how a step is computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmserve.models.decoder.packed_linear import packed_weight

# rows of the product that measures the peak: enough to leave the weight's read behind
PEAK_ROWS = 1024


@dataclass(slots=True, frozen=True)
class Work:
    """What one step has to do at least: multiply and add, and read weights and cached keys."""

    flops: float
    num_bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.num_bytes + other.num_bytes)


@dataclass(slots=True, frozen=True)
class Machine:
    """What this machine reached: operations and bytes a second, the better of reads and copies."""

    flops_per_s: float
    bytes_per_s: float

    def bound_s(self, work: Work) -> float:
        """The seconds below which no step of that work can end: the slower of both kinds."""
        return max(work.flops / self.flops_per_s, work.num_bytes / self.bytes_per_s)


def decode_work(
    config: Any,
    num_seqs: int,
    context_len: int,
    num_keys: int,
    itemsize: int,
    layer_itemsize: int | None = None,
) -> Work:
    """One token for each of num_seqs sequences of context_len tokens.

    config: the model's text configuration; num_keys: the vision tokens that each sequence sees, 0
    where none: its cross-attention layers are then skipped. itemsize: bytes of a number;
    layer_itemsize: of a layer's weights, where they are quantized.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    kv_width = hidden // config.num_attention_heads * config.num_key_value_heads
    num_cross = len(config.cross_attention_layers)
    num_self = config.num_hidden_layers - num_cross
    mlp = 3 * hidden * inner
    layers = num_self * (2 * hidden * hidden + 2 * hidden * kv_width + mlp)
    head = config.vocab_size * hidden
    keys = num_self * context_len
    if num_keys:
        layers += num_cross * (2 * hidden * hidden + mlp)
        keys += num_cross * num_keys
    # a key and its value: one product with the query's heads each, one read of kv_width each
    flops = 2.0 * num_seqs * (layers + head + 2 * hidden * keys)
    read = float(itemsize) * (head + 2 * kv_width * num_seqs * keys)
    return Work(flops, read + layers * (layer_itemsize or itemsize))


def prompt_work(text: Any, num_seqs: int, prompt_len: int, num_keys: int, size: int) -> Work:
    """The tokens of num_seqs prompts, which see num_keys keys of an image each.

    text: the decoder's config; size: bytes of a number.
    """
    # a prompt is so many tokens that see half of it on average, and one product with the head
    tokens = decode_work(text, num_seqs * prompt_len, prompt_len // 2, num_keys, size)
    num_heads_saved = num_seqs * (prompt_len - 1)
    return tokens + Work(-2.0 * num_heads_saved * text.vocab_size * text.hidden_size, 0.0)


def prefill_work(config: Any, num_seqs: int, prompt_len: int, num_tiles: int, size: int) -> Work:
    """The prompts of num_seqs requests, one image of num_tiles tiles each.

    config: the whole model's; size: bytes of a number. Padding tiles count, because the vision
    encoder must see them; of the prompt's logits only the last token's.
    """
    text, vision = config.text_config, config.vision_config
    kv_width = text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    num_patches = (vision.image_size // vision.patch_size) ** 2 + 1
    num_keys = num_tiles * num_patches
    tokens = prompt_work(text, num_seqs, prompt_len, num_keys, size)
    projected = vision.vision_output_dim * text.hidden_size
    cross = len(text.cross_attention_layers) * 2 * text.hidden_size * kv_width
    seen = _vision_work(vision, num_seqs, num_patches, size)
    extra = 2.0 * num_seqs * num_keys * (projected + cross)
    return tokens + seen + Work(extra, float(size) * (projected + cross))


def _vision_work(vision: Any, num_images: int, num_patches: int, itemsize: int) -> Work:
    hidden, inner = vision.hidden_size, vision.intermediate_size
    num_layers = vision.num_hidden_layers + vision.num_global_layers
    num_tokens = vision.max_num_tiles * (num_patches + -num_patches % 8)
    weights = num_layers * (4 * hidden * hidden + 2 * hidden * inner)
    attention = num_layers * 2 * hidden * num_tokens
    flops = 2.0 * num_images * num_tokens * (weights + attention)
    return Work(flops, float(itemsize) * weights)


class MachineProbe:
    """Measures a `Machine`, again and again between the runs of a benchmark."""

    def __init__(self, dtype: torch.dtype, hidden: int, inner: int, num_bytes: int) -> None:
        """hidden, inner: the product's sides; num_bytes: how much a read or copy takes."""
        self._left = torch.randn(PEAK_ROWS, hidden).to(dtype)
        self._weight = torch.randn(inner, hidden).to(dtype)
        self._source = torch.ones(num_bytes // 4 + 1)
        self._target: Tensor = torch.zeros_like(self._source)

    @torch.inference_mode()
    def measure(self) -> Machine:
        flops = 2.0 * self._left.numel() * len(self._weight)
        product_s = min(_seconds(product, 10) for product in self._products())
        copy_s = _seconds(lambda: self._target.copy_(self._source), 3)
        read_s = _seconds(self._source.sum, 3)
        num_bytes = 4.0 * len(self._source)
        return Machine(flops / product_s, max(2.0 * num_bytes / copy_s, num_bytes / read_s))

    def _products(self) -> Iterator[Callable[[], Tensor]]:
        """The same product as torch computes it, in float32, and with a reordered weight."""
        yield lambda: torch.nn.functional.linear(self._left, self._weight)
        left, weight = self._left.float(), self._weight.float()
        yield lambda: torch.nn.functional.linear(left, weight)
        packed = packed_weight(self._weight)
        if packed is not None:
            yield lambda: packed.product(self._left)


def _seconds(call: Callable[[], Any], count: int) -> float:
    """The best of `count` calls after one to warm up: a peak is not an average."""
    call()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
