"""What a decoder computes between its products: norms, rotation, gated MLP, sums.

Owns the interface, torch's operations, and the choice by the device. Knows nothing of layers.

    CPU     torch's own operations; a sum goes with the product before it
    CUDA    a Triton kernel each for: the sum and the norm after it; the rotation of queries and
            keys and the write of keys and values; the gated MLP's middle (fused_kernels.py)

A layer's sum waits in the `Stream` until the next norm needs it, so that both can be one kernel.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..attention import AttentionBackend
from ..attention.sdpa import SdpaBackend
from ..kernels.self_test import are_usable
from ..kv_cache.paged_cache import LayerCache
from .linear_products import Product

Activation = Callable[[Tensor], Tensor]
# transformers has a class of its own for it
SILU_CLASSES = (nn.SiLU, type(ACT2FN["silu"]))


@dataclass(slots=True)
class Stream:
    """The hidden states between layers, [num_tokens, hidden], and what is still to be added.

    update: of the same shape, times gate (one element) and row_mask ([num_tokens, 1]), where given.
    """

    hidden: Tensor
    update: Tensor | None = None
    gate: Tensor | None = None
    row_mask: Tensor | None = None


@dataclass(slots=True, frozen=True)
class Heads:
    """How many heads of queries, and of keys and values, lie side by side in a joined product."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Rotation:
    """cos and sin of a step's positions, [num_tokens, head_dim], both halves alike.

    As transformers hands them on.
    """

    cos: Tensor
    sin: Tensor

    @functools.cached_property
    def _signed_sin(self) -> Tensor:
        """sin, its first half negated: rotate_half(x) * sin is x rolled by half a head times it.

        Made where a rotation is torch's, once a step: the kernels take sin as it is.
        """
        half = self.sin.shape[-1] // 2
        return torch.cat((-self.sin[:, :half], self.sin[:, half:]), dim=-1)

    def __call__(self, heads: Tensor) -> Tensor:
        """[num_tokens, num_heads, head_dim] rotated."""
        half = self.cos.shape[-1] // 2
        rolled = heads.roll(half, -1)
        return torch.addcmul(heads * self.cos[:, None], rolled, self._signed_sin[:, None])


class Operations(ABC):
    """The interface; holds no state between calls."""

    @abstractmethod
    def add(self, stream: Stream, product: Product, states: Tensor) -> None:
        """Add a product of `states` to the stream."""

    @abstractmethod
    def add_gated(
        self,
        stream: Stream,
        product: Product,
        states: Tensor,
        gate: Tensor,
        row_mask: Tensor | None = None,
    ) -> None:
        """Add a product times a gate, and times a row's mask where there is one."""

    @abstractmethod
    def norm(self, stream: Stream, weight: Tensor, eps: float) -> Tensor:
        """The stream's RMS norm, [num_tokens, hidden]; what waited has been added then."""

    @abstractmethod
    def rotate_and_write(
        self,
        joined: Tensor,
        heads: Heads,
        rotation: Rotation,
        cache: LayerCache,
        slots: Tensor,
        backend: AttentionBackend,
    ) -> Tensor:
        """Rotate queries and keys, store keys and values in their slots, give the queries.

        joined: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], queries, keys, values; the
        result: [num_tokens, num_heads, head_dim].
        """

    @abstractmethod
    def gated(self, joined: Tensor, activation: Activation) -> Tensor:
        """activation(gate) * up of [num_tokens, 2 * width], gate first: [num_tokens, width]."""


class TorchOperations(Operations):
    """By torch's operations, on any device; rounds sums, rotations and norms once."""

    def add(self, stream: Stream, product: Product, states: Tensor) -> None:
        """See `Operations.add`."""
        stream.hidden = product.plus(states, stream.hidden)

    def add_gated(
        self,
        stream: Stream,
        product: Product,
        states: Tensor,
        gate: Tensor,
        row_mask: Tensor | None = None,
    ) -> None:
        """See `Operations.add_gated`."""
        factor = gate if row_mask is None else gate * row_mask
        stream.hidden = torch.addcmul(stream.hidden, product(states), factor)

    def norm(self, stream: Stream, weight: Tensor, eps: float) -> Tensor:
        """See `Operations.norm`."""
        return F.rms_norm(stream.hidden, weight.shape, weight, eps)

    def rotate_and_write(
        self,
        joined: Tensor,
        heads: Heads,
        rotation: Rotation,
        cache: LayerCache,
        slots: Tensor,
        backend: AttentionBackend,
    ) -> Tensor:
        """See `Operations.rotate_and_write`."""
        separate = joined.view(len(joined), -1, heads.head_dim)
        num_rotated = heads.num_heads + heads.num_kv_heads
        rotated = rotation(separate[:, :num_rotated])
        keys, values = rotated[:, heads.num_heads :], separate[:, num_rotated:]
        backend.write(keys, values, cache.keys, cache.values, slots)
        return rotated[:, : heads.num_heads]

    def gated(self, joined: Tensor, activation: Activation) -> Tensor:
        """See `Operations.gated`."""
        gate, up = joined.chunk(2, dim=-1)
        return activation(gate).mul_(up)


class TritonOperations(TorchOperations):
    """By this project's kernels; computes in float32 and rounds each result once."""

    def __init__(self) -> None:
        from . import kernel_launch as fused_launch

        self._launch = fused_launch

    def add(self, stream: Stream, product: Product, states: Tensor) -> None:
        """See `Operations.add`."""
        self._wait(stream, product(states))

    def add_gated(
        self,
        stream: Stream,
        product: Product,
        states: Tensor,
        gate: Tensor,
        row_mask: Tensor | None = None,
    ) -> None:
        """See `Operations.add_gated`."""
        self._wait(stream, product(states), gate, row_mask)

    def _wait(
        self,
        stream: Stream,
        update: Tensor,
        gate: Tensor | None = None,
        row_mask: Tensor | None = None,
    ) -> None:
        assert stream.update is None, "a norm stands between two sums"
        stream.update, stream.gate, stream.row_mask = update, gate, row_mask

    def norm(self, stream: Stream, weight: Tensor, eps: float) -> Tensor:
        """See `Operations.norm`."""
        if stream.update is None:
            return super().norm(stream, weight, eps)
        stream.hidden, normed = self._launch.add_norm(
            stream.hidden, stream.update, weight, eps, stream.gate, stream.row_mask
        )
        stream.update = stream.gate = stream.row_mask = None
        return normed

    def rotate_and_write(
        self,
        joined: Tensor,
        heads: Heads,
        rotation: Rotation,
        cache: LayerCache,
        slots: Tensor,
        backend: AttentionBackend,
    ) -> Tensor:
        """See `Operations.rotate_and_write`; the layout of a layer's cache is every backend's."""
        return self._launch.rotate_and_write(
            joined, rotation.cos, rotation.sin, cache.keys, cache.values, slots, heads.num_heads
        )

    def gated(self, joined: Tensor, activation: Activation) -> Tensor:
        """See `Operations.gated`; an activation other than SiLU is left to torch."""
        if not isinstance(activation, SILU_CLASSES):
            return super().gated(joined, activation)
        return self._launch.silu_gated(joined)


def choose_operations(device: torch.device, dtype: torch.dtype) -> Operations:
    """The fastest that the device has; kernels are tried once before they are taken."""
    return TritonOperations() if _has_kernels(device, dtype) else TorchOperations()


@functools.cache
def _has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    what = "norms, rotation and the gated MLP"
    return are_usable(what, device, lambda: trial_pairs(TritonOperations(), device, dtype))


def trial_pairs(
    operations: Operations, device: torch.device, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """What operations and torch's give for the same few rows: every kernel computes once."""
    given, expected = (_trial(one, device, dtype) for one in (operations, TorchOperations()))
    return list(zip(given, expected, strict=True))


def _trial(operations: Operations, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    heads, generator = Heads(2, 1, 64), torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
    stream, product = Stream(random(3, width)), _Given(random(3, width))
    weight, states = random(width), random(3, 8)
    operations.add(stream, product, states)
    normed = operations.norm(stream, weight, 1e-5)
    operations.add_gated(stream, product, states, random(1), (random(3, 1) > 0).to(dtype))
    gated_normed = operations.norm(stream, weight, 1e-5)
    cos, sin = (random(3, heads.head_dim // 2).repeat(1, 2) for _ in range(2))
    cache = LayerCache(*(random(1, 4, heads.num_kv_heads, heads.head_dim) for _ in range(2)))
    slots = torch.tensor([2, 0, 3], device=device)
    rotation = Rotation(cos, sin)
    query = operations.rotate_and_write(normed, heads, rotation, cache, slots, SdpaBackend())
    gated = operations.gated(normed, nn.SiLU())
    return [normed, gated_normed, stream.hidden, query, cache.keys, cache.values, gated]


class _Given(Product):
    """A product that is known already."""

    def __init__(self, result: Tensor) -> None:
        super().__init__()
        self._result = result

    def forward(self, states: Tensor) -> Tensor:
        """See `Product.forward`."""
        return self._result
