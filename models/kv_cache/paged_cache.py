"""The two pools of keys and values, and their interface to transformers' Mllama.

Owns the pools' memory, the data that a step gives every layer, and the attention function
registered with transformers. The router decides which block belongs to which request.

    text pool    each self-attention layer   [num_text_blocks, block_size, num_kv_heads, head_dim]
    image pool   each cross-attention layer  [num_image_blocks, num_patches, num_kv_heads, head_dim]

The image pool may be in int8, with scales (`attention/int8_states.py`). One image block is one
real tile. All tokens of a step are in one row, [1, num_tokens]. The step passes through the
unmodified module as a keyword argument and in the cache object, without global state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, MllamaTextConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention

from ..attention import AttentionBackend
from ..attention.int8_states import SCALE_DTYPE, Int8States, States, entry_bytes
from ..batch import BlockCopy, PoolSizes
from ..device_copies import upload

ATTENTION_NAME = "vlmserve_paged"

POISON = 1000.0


@dataclass(slots=True, frozen=True)
class LayerCache:
    """One layer's keys and values, in the layouts above."""

    keys: States
    values: States

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer that is never in int8: a self-attention layer."""
        assert isinstance(self.keys, Tensor), "text is never in int8"
        assert isinstance(self.values, Tensor), "text is never in int8"
        return self.keys, self.values


@dataclass(slots=True, frozen=True)
class KVPools:
    """The memory of both pools, by the model's layer index."""

    layers: list[LayerCache]
    cross_layers: frozenset[int]
    num_patches: int


@dataclass(slots=True, frozen=True)
class PagedStep:
    """The data that one step gives every layer.

    text_slots: int64 [num_tokens], the slots of this step's tokens in the text pool. image_slots:
    int64 [num_new_vision_tokens], the slots of newly encoded images; None without any. text_plan,
    cross_plan: the backend's plans; cross_plan is None if no token of the step sees an image.
    """

    backend: AttentionBackend
    text_slots: Tensor
    image_slots: Tensor | None
    text_plan: Any
    cross_plan: Any

    @property
    def uses_cross_layers(self) -> bool:
        return self.cross_plan is not None or self.image_slots is not None


def allocate_pools(
    config: MllamaTextConfig,
    sizes: PoolSizes,
    num_patches: int,
    dtype: torch.dtype,
    devices: Sequence[torch.device],
    num_ranks: int = 1,
) -> KVPools:
    """Both pools, zeroed; on a CPU, blocks take memory when they are first used.

    devices: of each layer. num_ranks: how many ranks share the KV heads.
    """
    head_dim = config.hidden_size // config.num_attention_heads
    cross_layers = frozenset(config.cross_attention_layers or ())
    layers = []
    for index in range(config.num_hidden_layers):
        text_shape = (sizes.num_text_blocks, sizes.block_size)
        is_cross = index in cross_layers
        blocks = (sizes.num_image_blocks, num_patches) if is_cross else text_shape
        shape = (*blocks, config.num_key_value_heads // num_ranks, head_dim)
        zeros = _int8_zeros if is_cross and sizes.has_int8_images else _zeros
        keys, values = (zeros(shape, dtype, devices[index]) for _ in range(2))
        layers.append(LayerCache(keys, values))
    return KVPools(layers, cross_layers, num_patches)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A zeroed tensor that on a CPU takes memory only when it is written.

    torch.zeros writes its zeros, so a pool of 4 GiB would be resident before the first request.
    numpy uses calloc, which returns the system's zero pages.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    align, num_bytes = 64, math.prod(shape) * dtype.itemsize
    raw = torch.from_numpy(np.zeros(num_bytes + align, dtype=np.uint8))
    offset = -raw.data_ptr() % align
    return raw[offset : offset + num_bytes].view(dtype).view(shape)


def _int8_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Int8States:
    codes, scales = _zeros(shape, torch.int8, device), _zeros(shape[:-1], SCALE_DTYPE, device)
    return Int8States(codes, scales, dtype)


def copy_blocks(pools: KVPools, copies: Sequence[BlockCopy]) -> None:
    """Copy text blocks in every self-attention layer; all sources are read first."""
    if not copies:
        return
    layers = [la for index, la in enumerate(pools.layers) if index not in pools.cross_layers]
    for device in {layer.keys.device for layer in layers}:
        sources = upload([copy.source for copy in copies], device, np.int64)
        targets = upload([copy.target for copy in copies], device, np.int64)
        for layer in layers:
            if layer.keys.device == device:
                for states in layer.tensors:
                    states[targets] = states[sources]


def poison_blocks(pools: KVPools, text_blocks: Sequence[int], image_blocks: Sequence[int]) -> None:
    """Overwrite freed blocks, so that any later read of them gives visibly wrong results.

    With a large number, not NaN: masked values are still multiplied by 0.
    """
    for index, layer in enumerate(pools.layers):
        block_ids = image_blocks if index in pools.cross_layers else text_blocks
        if block_ids:
            rows = upload(list(block_ids), layer.keys.device, np.int64)
            for states in (layer.keys, layer.values):
                if isinstance(states, Int8States):
                    states.fill(rows, POISON)
                else:
                    states[rows] = POISON


def token_bytes(config: MllamaTextConfig, dtype: torch.dtype) -> int:
    """Bytes of one token in the text pool, over all self-attention layers."""
    num_self = config.num_hidden_layers - len(config.cross_attention_layers or ())
    return num_self * _entry_bytes(config, dtype)


def tile_bytes(
    config: MllamaTextConfig, num_patches: int, dtype: torch.dtype, is_int8: bool = False
) -> int:
    """Bytes of one tile in the image pool, over all cross-attention layers."""
    head_dim = config.hidden_size // config.num_attention_heads
    num_bytes = _entry_bytes(config, dtype)
    if is_int8:
        num_bytes = 2 * config.num_key_value_heads * entry_bytes(head_dim)
    return len(config.cross_attention_layers or ()) * num_patches * num_bytes


def _entry_bytes(config: MllamaTextConfig, dtype: torch.dtype) -> int:
    head_dim = config.hidden_size // config.num_attention_heads
    return 2 * config.num_key_value_heads * head_dim * dtype.itemsize


class PagedLayer:
    """One layer of the cache, as transformers uses it during one step.

    `is_initialized`, `keys` and `get_seq_length` show whether a cross-attention layer has anything
    cached; if not, transformers skips the layer. So a step in which no token sees an image skips
    its cross-attention layers, which would change nothing.
    """

    __slots__ = ("_cache", "_is_active", "_slots", "_step")
    is_compileable = False
    is_sliding = False

    def __init__(self, cache: LayerCache, step: PagedStep, is_cross: bool) -> None:
        self._cache = cache
        self._step = step
        self._slots = step.image_slots if is_cross else step.text_slots
        self._is_active = step.uses_cross_layers if is_cross else True

    @property
    def is_initialized(self) -> bool:
        return self._is_active

    @property
    def keys(self) -> States:
        return self._cache.keys if self._is_active else self._cache.keys[:0]

    @property
    def values(self) -> States:
        return self._cache.values if self._is_active else self._cache.values[:0]

    def get_seq_length(self) -> int:
        return int(self._is_active)

    def update(self, keys: Tensor, values: Tensor) -> tuple[States, States]:
        """Write [1, num_kv_heads, num_tokens, head_dim] to slots; returns the whole pool."""
        assert self._slots is not None, "a layer without slots got keys"
        self._step.backend.write(
            keys[0].transpose(0, 1),
            values[0].transpose(0, 1),
            self._cache.keys,
            self._cache.values,
            self._slots,
        )
        return self._cache.keys, self._cache.values


class PagedCache:
    """The `past_key_values` of transformers' Mllama for one step.

    Not a subclass of transformers' Cache: the text model uses only `layers`, `update` and
    `get_seq_length`, and the registered mask function needs no sizes.
    """

    is_compileable = False

    def __init__(self, pools: KVPools, step: PagedStep) -> None:
        self.layers = [
            PagedLayer(layer, step, index in pools.cross_layers)
            for index, layer in enumerate(pools.layers)
        ]

    def __len__(self) -> int:
        return len(self.layers)

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[States, States]:
        """See `PagedLayer.update`; older releases pass more arguments."""
        return self.layers[layer_idx].update(keys, values)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Not 0 if the layer has something cached; positions are always passed explicitly."""
        return self.layers[layer_idx].get_seq_length()

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """transformers calls it before the mask function, which returns no mask."""
        return 1, 0


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: States,
    value: States,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    paged_step: PagedStep,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function over the pools: [1, num_tokens, num_heads, head_dim].

    query: [1, num_heads, num_tokens, head_dim]; key, value: the layer's whole pool, from
    `PagedLayer`. A token that sees no image gets zeros from a cross layer, as by Meta's row mask.
    """
    packed = query[0].transpose(0, 1)
    is_cross = isinstance(module, MllamaTextCrossAttention)
    plan = paged_step.cross_plan if is_cross else paged_step.text_plan
    if plan is None:
        return torch.zeros_like(packed)[None], None
    return paged_step.backend.attend(packed, key, value, plan, scaling)[None], None


def no_mask(*args: Any, **kwargs: Any) -> None:
    """No mask: the plan defines what each token sees."""


AttentionInterface.register(ATTENTION_NAME, paged_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, no_mask)
