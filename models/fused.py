"""The decoder on a CPU in fewer and larger operations, with the mathematics of transformers'.

Owns the exchange of decoder layers and the pass through them. Knows nothing of requests, of how
attention is computed, or of models whose parts lie apart: those keep transformers' modules.

    self    norm -> one product for q, k, v -> one rotation for q and k -> slots, attention
            -> product plus what came in -> norm -> one product for gate and up -> product plus ...
    cross   keys and values in one product, of new images only; gates' tanh computed once

A step of few tokens is thereby half as many calls from Python. Products of the same states share
their read of them and their threads' rendezvous. Rounding differs from transformers' where an
operation keeps float32 inside: sums, rotations and norms are rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.mllama.modeling_mllama import (
    MllamaCrossAttentionDecoderLayer,
    MllamaSelfAttentionDecoderLayer,
    MllamaTextModel,
)

from .cache import KVPools, LayerCache, PagedStep
from .packed import PackedWeight, can_pack


class Product(nn.Module):
    """A linear layer without bias, or several of the same states side by side."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        """Takes a copy of the weights: drop the layers to free them."""
        super().__init__()
        weights = [linear.weight.detach() for linear in linears]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self._packed = PackedWeight(weight) if can_pack(weight) else None
        kept = None if self._packed is not None else nn.Parameter(weight, requires_grad=False)
        self._weight: nn.Parameter | None
        self.register_parameter("_weight", kept)

    def forward(self, states: Tensor) -> Tensor:
        """[num_tokens, in_features] to [num_tokens, out_features]."""
        if self._packed is not None:
            return self._packed.product(states)
        assert self._weight is not None
        return F.linear(states, self._weight)

    def plus(self, states: Tensor, addend: Tensor) -> Tensor:
        """The product and `addend`, of its shape, in one operation where there is one."""
        if self._packed is not None:
            return self._packed.product_plus(states, addend)
        assert self._weight is not None
        return torch.addmm(addend, states, self._weight.T)


class RmsNorm(nn.Module):
    """transformers' RMSNorm, rounded once."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self._weight = nn.Parameter(norm.weight.detach(), requires_grad=False)
        self._shape = tuple(norm.weight.shape)
        self._eps = float(norm.variance_epsilon)

    def forward(self, states: Tensor) -> Tensor:
        return F.rms_norm(states, self._shape, self._weight, self._eps)


class Mlp(nn.Module):
    """The gated MLP up to its last product, which the layer takes together with its sum."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self._gate_up = Product([mlp.gate_proj, mlp.up_proj])
        self._act = mlp.act_fn
        self.down = Product([mlp.down_proj])

    def forward(self, states: Tensor) -> Tensor:
        """[num_tokens, hidden] to [num_tokens, intermediate]."""
        gate, up = self._gate_up(states).chunk(2, dim=-1)
        inner: Tensor = self._act(gate).mul_(up)
        return inner


class Rotation:
    """Rotary embedding of a step's positions, in three operations instead of ten."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        """cos, sin: [num_tokens, head_dim], both halves alike, as transformers hands them on."""
        half = sin.shape[-1] // 2
        self._half = half
        self._cos = cos[:, None]
        # rotate_half(x) * sin = x rolled by half a head * sin with its first half negated
        self._sin = torch.cat((-sin[:, :half], sin[:, half:]), dim=-1)[:, None]

    def __call__(self, heads: Tensor) -> Tensor:
        """[num_tokens, num_heads, head_dim] rotated."""
        return torch.addcmul(heads * self._cos, heads.roll(self._half, -1), self._sin)


class FusedSelfLayer(nn.Module):
    """A self-attention layer."""

    def __init__(self, layer: MllamaSelfAttentionDecoderLayer) -> None:
        super().__init__()
        attention: Any = layer.self_attn
        self._num_heads = attention.num_heads
        self._num_keyed = attention.num_heads + attention.num_key_value_heads
        self._head_dim = attention.head_dim
        self._scale = attention.scaling
        self._norm = RmsNorm(layer.input_layernorm)
        self._qkv = Product([attention.q_proj, attention.k_proj, attention.v_proj])
        self._out = Product([attention.o_proj])
        self._mlp_norm = RmsNorm(layer.post_attention_layernorm)
        self._mlp = Mlp(layer.mlp)

    def forward(
        self, hidden: Tensor, rotation: Rotation, cache: LayerCache, step: PagedStep
    ) -> Tensor:
        """[num_tokens, hidden] to the same; the step's keys and values go to their slots."""
        num_tokens = len(hidden)
        heads = self._qkv(self._norm(hidden)).view(num_tokens, -1, self._head_dim)
        rotated = rotation(heads[:, : self._num_keyed])
        keys, values = rotated[:, self._num_heads :], heads[:, self._num_keyed :]
        step.backend.write(keys, values, cache.keys, cache.values, step.text_slots)
        query = rotated[:, : self._num_heads]
        mixed = step.backend.attend(query, cache.keys, cache.values, step.text_plan, self._scale)
        hidden = self._out.plus(mixed.reshape(num_tokens, -1), hidden)
        return self._mlp.down.plus(self._mlp(self._mlp_norm(hidden)), hidden)


class FusedCrossLayer(nn.Module):
    """A cross-attention layer."""

    def __init__(self, layer: MllamaCrossAttentionDecoderLayer) -> None:
        super().__init__()
        attention: Any = layer.cross_attn
        self._head_dim = attention.head_dim
        self._num_kv_heads = attention.num_key_value_heads
        self._scale = attention.scaling
        self._norm = RmsNorm(layer.input_layernorm)
        self._query = Product([attention.q_proj])
        self._key_value = Product([attention.k_proj, attention.v_proj])
        self._query_norm, self._key_norm = RmsNorm(attention.q_norm), RmsNorm(attention.k_norm)
        self._out = Product([attention.o_proj])
        self._attention_gate = _opening(layer.cross_attn_attn_gate)
        self._mlp_norm = RmsNorm(layer.post_attention_layernorm)
        self._mlp = Mlp(layer.mlp)
        self._mlp_gate = _opening(layer.cross_attn_mlp_gate)

    def write(self, vision: Tensor, cache: LayerCache, step: PagedStep) -> None:
        """Keys and values of new images, [num_vision_tokens, hidden], to their slots."""
        assert step.image_slots is not None, "vision states came without slots"
        projected = self._key_value(vision).view(len(vision), 2, self._num_kv_heads, -1)
        keys, values = self._key_norm(projected[:, 0]), projected[:, 1]
        step.backend.write(keys, values, cache.keys, cache.values, step.image_slots)

    def forward(
        self, hidden: Tensor, row_mask: Tensor | None, cache: LayerCache, step: PagedStep
    ) -> Tensor:
        """[num_tokens, hidden] to the same. row_mask: [num_tokens, 1], 0 where no image is seen.

        The attention's output is 0 there already.
        """
        num_tokens = len(hidden)
        query = self._query_norm(
            self._query(self._norm(hidden)).view(num_tokens, -1, self._head_dim)
        )
        mixed = step.backend.attend(query, cache.keys, cache.values, step.cross_plan, self._scale)
        attended = self._out(mixed.reshape(num_tokens, -1))
        hidden = torch.addcmul(hidden, attended, self._attention_gate)
        inner = self._mlp.down(self._mlp(self._mlp_norm(hidden)))
        factor = self._mlp_gate if row_mask is None else self._mlp_gate * row_mask
        return torch.addcmul(hidden, inner, factor)


def _opening(gate: Tensor) -> nn.Parameter:
    """How far a gate is open, which transformers computes at every step."""
    return nn.Parameter(gate.detach().tanh(), requires_grad=False)


class FusedDecoder:
    """The pass of one step through a text model whose layers were exchanged."""

    def __init__(self, text_model: MllamaTextModel) -> None:
        self._text_model = text_model
        self._layers: list[Any] = list(text_model.layers)
        self._norm = RmsNorm(text_model.norm)

    def __call__(
        self,
        token_ids: Tensor,
        positions: Tensor,
        vision: Tensor | None,
        row_mask: Tensor | None,
        pools: KVPools,
        step: PagedStep,
    ) -> Tensor:
        """The normalised hidden states of all tokens, [num_tokens, hidden].

        token_ids, positions: int64 [num_tokens]; vision: [num_vision_tokens, hidden] of the images
        that are new; row_mask: [num_tokens, 1], None where every token sees an image.
        """
        model: Any = self._text_model
        hidden = model.embed_tokens(token_ids)
        cos, sin = model.rotary_emb(hidden[None], position_ids=positions[None])
        rotation = Rotation(cos[0], sin[0])
        for layer, cache in zip(self._layers, pools.layers, strict=True):
            if isinstance(layer, FusedSelfLayer):
                hidden = layer(hidden, rotation, cache, step)
                continue
            if vision is not None:
                layer.write(vision, cache, step)
            if step.cross_plan is not None:  # else no token sees an image: nothing would change
                hidden = layer(hidden, row_mask, cache, step)
        return self._norm(hidden)


def fuse_layers(text_model: MllamaTextModel) -> bool:
    """Exchange all decoder layers, in place, where they can be: whole, on a CPU, not quantized.

    One at a time, so that no second copy of the whole model is ever in memory.
    """
    if not all(_is_fusable(*named) for named in text_model.layers.named_modules()):
        return False
    layers: Any = text_model.layers
    for index, layer in enumerate(layers):
        is_self = isinstance(layer, MllamaSelfAttentionDecoderLayer)
        layers[index] = FusedSelfLayer(layer) if is_self else FusedCrossLayer(layer)
    return True


def is_fused(text_model: nn.Module) -> TypeGuard[MllamaTextModel]:
    """Whether `fuse_layers` exchanged its layers."""
    layers: Any = text_model.layers
    return isinstance(layers[0], (FusedSelfLayer, FusedCrossLayer))


def _is_fusable(name: str, module: nn.Module) -> bool:
    # exactly nn.Linear: a quantized layer has a weight of its own kind, a rank's needs the others'
    if name.endswith("_proj") and type(module) is not nn.Linear:
        return False
    # accelerate's hooks bring a layer's weights from where they lie
    if hasattr(module, "_hf_hook"):
        return False
    return all(parameter.device.type == "cpu" for parameter in module.parameters(recurse=False))
