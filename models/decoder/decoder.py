"""The decoder on one device, in fewer and larger operations than transformers' layers.

Replaces the decoder layers and runs a step through them. Models on several devices, and layers of
bitsandbytes, keep transformers' modules.

    self    norm -> one product for q, k, v -> one rotation for q and k -> slots, attention
            -> product plus the input -> norm -> one product for gate and up -> product plus ...
    cross   one product for keys and values, of new images only; gates' tanh computed once

A step of few tokens makes half as many calls from Python. Rounding differs from transformers' where
an operation keeps float32 inside: sums, rotations and norms are rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import (
    MllamaCrossAttentionDecoderLayer,
    MllamaSelfAttentionDecoderLayer,
    MllamaTextModel,
)

from ..kv_cache.paged_cache import KVPools, LayerCache, PagedStep
from .linear_products import LinearProduct, can_join, product_of
from .operations import (
    Heads,
    LayerOperations,
    Rotation,
    Stream,
    TrialSizes,
    choose_operations,
)


class RmsNorm(nn.Module):
    """The weight and eps of transformers' RMSNorm."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach(), requires_grad=False)
        self.eps = float(norm.variance_epsilon)

    def forward(self, states: Tensor) -> Tensor:
        """The norm of any states over their last dimension; rounded once."""
        return F.rms_norm(states, self.weight.shape, self.weight, self.eps)

    def of(self, stream: Stream, operations: LayerOperations) -> Tensor:
        """The norm of the stream, [num_tokens, hidden]."""
        return operations.norm(stream, self.weight, self.eps)


class Mlp(nn.Module):
    """The gated MLP without its last product, which the layer combines with its sum."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self._gate_up = product_of([mlp.gate_proj, mlp.up_proj])
        self._act = mlp.act_fn
        self.down = product_of([mlp.down_proj])

    def forward(self, states: Tensor, operations: LayerOperations) -> Tensor:
        """[num_tokens, hidden] to [num_tokens, intermediate]."""
        return operations.gated(operations.product(self._gate_up, states), self._act)

    def products(self) -> dict[tuple[str, ...], LinearProduct]:
        """Each product by the names of its layers in the decoder layer."""
        return {("mlp.gate_proj", "mlp.up_proj"): self._gate_up, ("mlp.down_proj",): self.down}


class FusedSelfLayer(nn.Module):
    """A self-attention layer."""

    def __init__(self, layer: MllamaSelfAttentionDecoderLayer) -> None:
        super().__init__()
        attention: Any = layer.self_attn
        self._heads = Heads(attention.num_heads, attention.num_key_value_heads, attention.head_dim)
        self._scale = attention.scaling
        self._norm = RmsNorm(layer.input_layernorm)
        self._qkv = product_of([attention.q_proj, attention.k_proj, attention.v_proj])
        self._out = product_of([attention.o_proj])
        self._mlp_norm = RmsNorm(layer.post_attention_layernorm)
        self._mlp = Mlp(layer.mlp)

    def forward(
        self,
        stream: Stream,
        operations: LayerOperations,
        rotation: Rotation,
        cache: LayerCache,
        step: PagedStep,
    ) -> None:
        """Add the layer to the stream, and write the step's keys and values to their slots."""
        joined = operations.product(self._qkv, self._norm.of(stream, operations))
        query = operations.rotate_and_write(
            joined, self._heads, rotation, cache, step.text_slots, step.backend
        )
        mixed = step.backend.attend(query, cache.keys, cache.values, step.text_plan, self._scale)
        operations.add(stream, self._out, mixed.reshape(len(joined), -1))
        inner = self._mlp(self._mlp_norm.of(stream, operations), operations)
        operations.add(stream, self._mlp.down, inner)

    def products(self) -> dict[tuple[str, ...], LinearProduct]:
        """Each product by the names of its layers in the decoder layer."""
        joined = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        return {joined: self._qkv, ("self_attn.o_proj",): self._out, **self._mlp.products()}


class FusedCrossLayer(nn.Module):
    """A cross-attention layer."""

    def __init__(self, layer: MllamaCrossAttentionDecoderLayer) -> None:
        super().__init__()
        attention: Any = layer.cross_attn
        self._head_dim = attention.head_dim
        self._num_kv_heads = attention.num_key_value_heads
        self._scale = attention.scaling
        self._norm = RmsNorm(layer.input_layernorm)
        self._query = product_of([attention.q_proj])
        self._key_value = product_of([attention.k_proj, attention.v_proj])
        self._query_norm, self._key_norm = RmsNorm(attention.q_norm), RmsNorm(attention.k_norm)
        self._out = product_of([attention.o_proj])
        self._attention_gate = _opening(layer.cross_attn_attn_gate)
        self._mlp_norm = RmsNorm(layer.post_attention_layernorm)
        self._mlp = Mlp(layer.mlp)
        self._mlp_gate = _opening(layer.cross_attn_mlp_gate)

    def write(
        self, vision: Tensor, operations: LayerOperations, cache: LayerCache, step: PagedStep
    ) -> None:
        """Write keys and values of new images, [num_vision_tokens, hidden], to their slots."""
        assert step.image_slots is not None, "vision states need slots"
        joined = operations.product(self._key_value, vision)
        projected = joined.view(len(vision), 2, self._num_kv_heads, -1)
        keys, values = self._key_norm(projected[:, 0]), projected[:, 1]
        step.backend.write(keys, values, cache.keys, cache.values, step.image_slots)

    def forward(
        self,
        stream: Stream,
        operations: LayerOperations,
        row_mask: Tensor | None,
        cache: LayerCache,
        step: PagedStep,
    ) -> None:
        """Add the layer to the stream.

        row_mask: [num_tokens, 1], 0 for a token that sees no image, where attention is 0 already.
        """
        states = operations.product(self._query, self._norm.of(stream, operations))
        query = self._query_norm(states.view(len(states), -1, self._head_dim))
        mixed = step.backend.attend(query, cache.keys, cache.values, step.cross_plan, self._scale)
        mixed = mixed.reshape(len(states), -1)
        operations.add_gated(stream, self._out, mixed, self._attention_gate)
        inner = self._mlp(self._mlp_norm.of(stream, operations), operations)
        operations.add_gated(stream, self._mlp.down, inner, self._mlp_gate, row_mask)

    def products(self) -> dict[tuple[str, ...], LinearProduct]:
        """Each product by the names of its layers in the decoder layer."""
        return {
            ("cross_attn.q_proj",): self._query,
            ("cross_attn.k_proj", "cross_attn.v_proj"): self._key_value,
            ("cross_attn.o_proj",): self._out,
            **self._mlp.products(),
        }


def _opening(gate: Tensor) -> nn.Parameter:
    """A gate's tanh, which transformers computes at every step."""
    return nn.Parameter(gate.detach().tanh(), requires_grad=False)


def _trial_sizes(config: MllamaTextConfig) -> TrialSizes:
    num_heads = config.num_attention_heads
    heads = Heads(num_heads, config.num_key_value_heads, config.hidden_size // num_heads)
    return TrialSizes(config.hidden_size, config.intermediate_size, heads)


class FusedDecoder:
    """Runs one step through a text model whose layers `fuse_layers` replaced."""

    def __init__(
        self, text_model: MllamaTextModel, operations: LayerOperations | None = None
    ) -> None:
        """operations: between the products; None uses the fastest of the device."""
        self._text_model = text_model
        weight = text_model.norm.weight
        self.operations = operations or choose_operations(
            weight.device, weight.dtype, _trial_sizes(text_model.config)
        )
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
        operations: LayerOperations | None = None,
    ) -> Tensor:
        """The normalised hidden states of all tokens, [num_tokens, hidden].

        token_ids, positions: int64 [num_tokens]; vision: [num_vision_tokens, hidden] of new images;
        row_mask: [num_tokens, 1], None if every token sees an image. operations: of this step, such
        as those that apply adapters.
        """
        model: Any = self._text_model
        operations = operations or self.operations
        stream = Stream(model.embed_tokens(token_ids))
        cos, sin = model.rotary_emb(stream.hidden[None], position_ids=positions[None])
        rotation = Rotation(cos[0], sin[0])
        for layer, cache in zip(self._layers, pools.layers, strict=True):
            if isinstance(layer, FusedSelfLayer):
                layer(stream, operations, rotation, cache, step)
                continue
            if vision is not None:
                layer.write(vision, operations, cache, step)
            if step.cross_plan is not None:  # otherwise no token sees an image
                layer(stream, operations, row_mask, cache, step)
        return self._norm.of(stream, operations)


def fuse_layers(text_model: MllamaTextModel) -> bool:
    """Replace all decoder layers, in place; False if they are offloaded or on several devices.

    One layer at a time, so that no second copy of the model is in memory.
    """
    devices = {parameter.device for parameter in text_model.parameters()}
    is_together = len(devices) == 1 and devices.pop().type in ("cpu", "cuda")
    if not is_together or not all(_is_fusable(*named) for named in text_model.named_modules()):
        return False
    layers: Any = text_model.layers
    for index, layer in enumerate(layers):
        is_self = isinstance(layer, MllamaSelfAttentionDecoderLayer)
        layers[index] = FusedSelfLayer(layer) if is_self else FusedCrossLayer(layer)
    return True


def is_fused(text_model: nn.Module) -> TypeGuard[MllamaTextModel]:
    """Whether `fuse_layers` replaced its layers."""
    layers: Any = text_model.layers
    return isinstance(layers[0], (FusedSelfLayer, FusedCrossLayer))


def _is_fusable(name: str, module: nn.Module) -> bool:
    # accelerate's hooks load a layer's offloaded weights
    is_bare = not hasattr(module, "_hf_hook")
    return is_bare and (not name.endswith("_proj") or can_join(module))


class LayerCount:
    """How many decoder and vision layers a model has started since it was loaded.

    Read from another thread: the count grows while a step computes, and stops if it hangs. One a
    model, however many runners use it. before_each: called before each layer, in its thread.
    """

    def __init__(self, model: nn.Module) -> None:
        self.num_started = 0
        self.before_each: Callable[[], None] | None = None
        for module in model.modules():
            if isinstance(module, nn.ModuleList):
                for layer in module:
                    layer.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, inputs: Any) -> None:
        self.num_started += 1
        if self.before_each is not None:
            self.before_each()
