"""The operations between a decoder's linear products: norms, rotation, gated MLP, sums.

    CPU     torch's operations; each sum is part of the product before it. In large models norms,
            rotation and the gated MLP's middle by C, if a compiler is installed
    CUDA    one Triton kernel each for: a sum and the norm after it; the rotation of queries and
            keys and the write of keys and values; the gated MLP's middle (fused_kernels.py)

On CUDA a layer's sum stays pending in the `Stream` until the next norm, so that one kernel does
both.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..attention import AttentionBackend
from ..attention.sdpa import SdpaBackend
from ..kernels import c_library, row_operations
from ..kernels.self_test import are_usable, what_is_wrong
from ..kv_cache.paged_cache import LayerCache
from .linear_products import Change, LinearProduct

logger = logging.getLogger(__name__)

Activation = Callable[[Tensor], Tensor]
# transformers has its own class
SILU_CLASSES = (nn.SiLU, type(ACT2FN["silu"]))


@dataclass(slots=True)
class Stream:
    """The hidden states between layers, [num_tokens, hidden], and a pending update.

    update: of the same shape, to be added times gate (one element) and row_mask ([num_tokens, 1]).
    """

    hidden: Tensor
    update: Tensor | None = None
    gate: Tensor | None = None
    row_mask: Tensor | None = None


@dataclass(slots=True, frozen=True)
class Heads:
    """How many query heads, and key and value heads, a joined product has."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Rotation:
    """cos and sin of a step's positions, [num_tokens, head_dim], with equal halves."""

    cos: Tensor
    sin: Tensor

    @functools.cached_property
    def _signed_sin(self) -> Tensor:
        """sin with its first half negated, so that rotate_half(x) * sin is x rolled times this.

        Computed once a step, for torch's rotation only.
        """
        half = self.sin.shape[-1] // 2
        return torch.cat((-self.sin[:, :half], self.sin[:, half:]), dim=-1)

    def __call__(self, heads: Tensor) -> Tensor:
        """[num_tokens, num_heads, head_dim] rotated."""
        half = self.cos.shape[-1] // 2
        rolled = heads.roll(half, -1)
        return torch.addcmul(heads * self.cos[:, None], rolled, self._signed_sin[:, None])


class LayerOperations:
    """By torch's operations, on any device. Rounds sums, rotations and norms once.

    Keeps no state between calls. Subclasses replace the operations that they do faster.
    """

    def product(self, product: LinearProduct, states: Tensor) -> Tensor:
        """A product of `states`, [num_tokens, out_features]."""
        result: Tensor = product(states)
        return result

    def add(self, stream: Stream, product: LinearProduct, states: Tensor) -> None:
        """Add a product of `states` to the stream."""
        stream.hidden = product.plus(states, stream.hidden)

    def add_changed(
        self, stream: Stream, product: LinearProduct, states: Tensor, change: Change
    ) -> None:
        """Add a product of `states` to the stream, after `change` has added to it."""
        stream.hidden = product.changed_plus(states, change, stream.hidden)

    def add_gated(
        self,
        stream: Stream,
        product: LinearProduct,
        states: Tensor,
        gate: Tensor,
        row_mask: Tensor | None = None,
    ) -> None:
        """Add a product times a gate, and times a row's mask if there is one."""
        self.add_update(stream, product(states), gate, row_mask)

    def add_update(
        self,
        stream: Stream,
        update: Tensor,
        gate: Tensor | None = None,
        row_mask: Tensor | None = None,
    ) -> None:
        """Add a computed product, times a gate and a row's mask if there are any."""
        if gate is None:
            stream.hidden = stream.hidden + update
            return
        factor = gate if row_mask is None else gate * row_mask
        stream.hidden = torch.addcmul(stream.hidden, update, factor)

    def norm(self, stream: Stream, weight: Tensor, eps: float) -> Tensor:
        """The stream's RMS norm, [num_tokens, hidden], after adding the pending update."""
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
        """Rotate queries and keys, store keys and values in their slots, return the queries.

        joined: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], queries, keys, values; the
        result: [num_tokens, num_heads, head_dim].
        """
        separate = joined.view(len(joined), -1, heads.head_dim)
        num_rotated = heads.num_heads + heads.num_kv_heads
        rotated = rotation(separate[:, :num_rotated])
        keys, values = rotated[:, heads.num_heads :], separate[:, num_rotated:]
        backend.write(keys, values, cache.keys, cache.values, slots)
        return rotated[:, : heads.num_heads]

    def gated(self, joined: Tensor, activation: Activation) -> Tensor:
        """activation(gate) * up of [num_tokens, 2 * width], gate first: [num_tokens, width]."""
        gate, up = joined.chunk(2, dim=-1)
        return activation(gate).mul_(up)


class CompiledOperations(LayerOperations):
    """By this project's C on a CPU, which computes in float32 and rounds each result once."""

    def norm(self, stream: Stream, weight: Tensor, eps: float) -> Tensor:
        return row_operations.rms_norm(stream.hidden, weight, eps)

    def rotate_and_write(
        self,
        joined: Tensor,
        heads: Heads,
        rotation: Rotation,
        cache: LayerCache,
        slots: Tensor,
        backend: AttentionBackend,
    ) -> Tensor:
        """As the base class; all backends use the same layout of a layer's cache."""
        return row_operations.rotate_and_write(
            joined, rotation.cos, rotation.sin, *cache.tensors, slots, heads.num_heads
        )

    def gated(self, joined: Tensor, activation: Activation) -> Tensor:
        """As the base class; only SiLU is compiled."""
        if not isinstance(activation, SILU_CLASSES):
            return super().gated(joined, activation)
        return row_operations.silu_gated(joined)


class TritonOperations(LayerOperations):
    """By this project's kernels, which compute in float32 and round each result once."""

    def __init__(self) -> None:
        from . import kernel_launch

        self._launch = kernel_launch

    def add(self, stream: Stream, product: LinearProduct, states: Tensor) -> None:
        self.add_update(stream, product(states))

    def add_changed(
        self, stream: Stream, product: LinearProduct, states: Tensor, change: Change
    ) -> None:
        self.add_update(stream, product.changed(states, change))

    def add_update(
        self,
        stream: Stream,
        update: Tensor,
        gate: Tensor | None = None,
        row_mask: Tensor | None = None,
    ) -> None:
        assert stream.update is None, "a norm comes between two sums"
        stream.update, stream.gate, stream.row_mask = update, gate, row_mask

    def norm(self, stream: Stream, weight: Tensor, eps: float) -> Tensor:
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
        """As the base class; all backends use the same layout of a layer's cache."""
        return self._launch.rotate_and_write(
            joined, rotation.cos, rotation.sin, *cache.tensors, slots, heads.num_heads
        )

    def gated(self, joined: Tensor, activation: Activation) -> Tensor:
        """As the base class; only SiLU has a kernel."""
        if not isinstance(activation, SILU_CLASSES):
            return super().gated(joined, activation)
        return self._launch.silu_gated(joined)


@dataclass(slots=True, frozen=True)
class TrialSizes:
    """The sizes at which the kernels are tried: those of the model that will use them."""

    hidden: int = 256
    inner: int = 128
    heads: Heads = field(default_factory=lambda: Heads(2, 1, 64))


def choose_operations(
    device: torch.device, dtype: torch.dtype, sizes: TrialSizes
) -> LayerOperations:
    """The fastest operations of the device; kernels are tried once before they are used."""
    is_worth_it = device.type == "cpu" and c_library.is_worth_it(sizes.hidden)
    if is_worth_it and _has_c(dtype, sizes):
        return CompiledOperations()
    return TritonOperations() if _has_kernels(device, dtype, sizes) else LayerOperations()


@functools.cache
def _has_c(dtype: torch.dtype, sizes: TrialSizes) -> bool:
    if not row_operations.fits(dtype, sizes.inner, sizes.heads.head_dim):
        return False
    device = torch.device("cpu")
    wrong = what_is_wrong(lambda: trial_pairs(CompiledOperations(), device, dtype, sizes))
    if wrong is not None:
        logger.warning("norms, rotation and the gated MLP use torch's operations: %s", wrong)
    return wrong is None


@functools.cache
def _has_kernels(device: torch.device, dtype: torch.dtype, sizes: TrialSizes) -> bool:
    names = "norms, rotation and the gated MLP"
    return are_usable(names, device, lambda: trial_pairs(TritonOperations(), device, dtype, sizes))


def trial_pairs(
    operations: LayerOperations,
    device: torch.device,
    dtype: torch.dtype,
    sizes: TrialSizes | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Results of these operations, and torch's in float32, for the same few rows.

    Runs every kernel once, at the sizes of a model: a kernel may fit a GPU at one width only.
    """
    sizes = sizes or TrialSizes()
    actual = _trial(operations, device, dtype, dtype, sizes)
    expected = _trial(LayerOperations(), device, dtype, torch.float32, sizes)
    return list(zip(actual, expected, strict=True))


def _trial(
    operations: LayerOperations,
    device: torch.device,
    rounded: torch.dtype,
    dtype: torch.dtype,
    sizes: TrialSizes,
) -> list[Tensor]:
    """The operations' results in `dtype`, for values that are rounded to `rounded`."""
    heads, generator = sizes.heads, torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, rounded).to(dtype)

    stream, product = Stream(random(3, sizes.hidden)), _Given(random(3, sizes.hidden))
    weight, states = random(sizes.hidden), random(3, 8)
    operations.add(stream, product, states)
    normed = operations.norm(stream, weight, 1e-5)
    operations.add_gated(stream, product, states, random(1), (random(3, 1) > 0).to(dtype))
    gated_normed = operations.norm(stream, weight, 1e-5)
    cos, sin = (random(3, heads.head_dim // 2).repeat(1, 2) for _ in range(2))
    cache = LayerCache(*(random(1, 4, heads.num_kv_heads, heads.head_dim) for _ in range(2)))
    slots = torch.tensor([2, 0, 3], device=device)
    joined = random(3, (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim)
    rotation = Rotation(cos, sin)
    query = operations.rotate_and_write(joined, heads, rotation, cache, slots, SdpaBackend())
    gated = operations.gated(random(3, 2 * sizes.inner), nn.SiLU())
    return [normed, gated_normed, stream.hidden, query, *cache.tensors, gated]


class _Given(LinearProduct):
    """A product with a given result."""

    def __init__(self, result: Tensor) -> None:
        super().__init__()
        self._result = result

    def forward(self, states: Tensor) -> Tensor:
        return self._result
