"""Keys or values of images in int8, with a scale for each token and KV head.

Owns the layout, and the arithmetic in torch; the Triton kernel reads the same tensors.

    codes    int8      [num_blocks, block_size, num_kv_heads, head_dim]
    scales   bfloat16  [num_blocks, block_size, num_kv_heads]
    value  = code * scale, with codes from -127 to 127

A scale's eight bits times a code's seven are exact in float32. One scale a tile would save 1.5% of
the memory, but a few tokens of large norm would cost all others of the tile their precision
(docs/log.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_CODE = 127
SCALE_DTYPE = torch.bfloat16
# a token of zeros has a scale too
MIN_SCALE = 1e-30
# slots that are converted at a time on a CPU: their codes stay in its cache
CPU_SLOTS = 1_024


@dataclass(slots=True, frozen=True)
class Int8States:
    """One layer's keys, or its values; dtype: that they are computed in."""

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def numel(self) -> int:
        """How many values it has; transformers asks whether there are any."""
        return self.codes.numel()

    def __getitem__(self, blocks: slice | Tensor) -> Int8States:
        return Int8States(self.codes[blocks], self.scales[blocks], self.dtype)

    def write(self, states: Tensor, slots: Tensor) -> None:
        """Quantize [num_tokens, num_kv_heads, head_dim] into slots, int64 [num_tokens]."""
        states = states.float()
        highest = states.abs().amax(-1, keepdim=True)
        scales = (highest / MAX_CODE).clamp_min_(MIN_SCALE).to(SCALE_DTYPE)
        codes = (states / scales).round_().clamp_(-MAX_CODE, MAX_CODE).to(torch.int8)
        self._rows().index_copy_(0, slots, codes.flatten(1))
        self._row_scales().index_copy_(0, slots, scales.flatten(1))

    def gather(self, slots: Tensor) -> Tensor:
        """The values of slots, int64 [n]: [n, num_kv_heads * head_dim] in `dtype`."""
        num_kv_heads, head_dim = self.shape[-2:]
        size = (len(slots), num_kv_heads, head_dim)
        found = torch.empty(size, dtype=self.dtype, device=self.device)
        step = CPU_SLOTS if self.device.type == "cpu" else max(1, len(slots))
        for part, some in zip(found.split(step), slots.split(step), strict=True):
            part.flatten(1).copy_(self._rows().index_select(0, some))
            part.mul_(self._row_scales().index_select(0, some).to(self.dtype)[..., None])
        return found.flatten(1)

    def fill(self, block_ids: Tensor, value: float) -> None:
        """Set all values of these blocks to `value`, to its scale's precision."""
        self.codes[block_ids] = MAX_CODE
        self.scales[block_ids] = value / MAX_CODE

    def _rows(self) -> Tensor:
        return self.codes.view(-1, self.shape[-2] * self.shape[-1])

    def _row_scales(self) -> Tensor:
        return self.scales.view(-1, self.shape[-2])


def entry_bytes(head_dim: int) -> int:
    """Bytes of one token's keys, or its values, of one KV head."""
    return head_dim + SCALE_DTYPE.itemsize


States = Tensor | Int8States


def write_states(states: Tensor, cache: States, slots: Tensor) -> None:
    """Store [num_tokens, num_kv_heads, head_dim] in slots, int64 [num_tokens], of a layer."""
    if isinstance(cache, Int8States):
        cache.write(states, slots)
        return
    width = states.shape[-2] * states.shape[-1]
    cache.view(-1, width).index_copy_(0, slots, states.reshape(-1, width))


def gather_states(cache: States, slots: Tensor) -> Tensor:
    """The states of slots, int64 [n], in the type of computation: [n, heads * head_dim]."""
    if isinstance(cache, Int8States):
        return cache.gather(slots)
    return cache.view(-1, cache.shape[-2] * cache.shape[-1]).index_select(0, slots)
