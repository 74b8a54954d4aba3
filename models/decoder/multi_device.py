"""One step of a model whose layers are on several devices.

Each layer finds the slots and plans of its own device by its pool; accelerate's hooks move the
hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..attention.int8_states import States
from ..kv_cache.paged_cache import (
    KVPools,
    PagedCache,
    PagedLayer,
    PagedStep,
    no_mask,
    paged_attention,
)

SPLIT_ATTENTION_NAME = "vlmserve_paged_split"


@dataclass(slots=True, frozen=True)
class SplitStep:
    """The same step on each device that has layers."""

    on: Mapping[torch.device, PagedStep]


class SplitCache(PagedCache):
    """A `PagedCache` whose layers write to slots on their own device."""

    def __init__(self, pools: KVPools, step: SplitStep) -> None:
        self.layers = [
            PagedLayer(layer, step.on[layer.keys.device], index in pools.cross_layers)
            for index, layer in enumerate(pools.layers)
        ]


def split_attention(
    module: nn.Module,
    query: Tensor,
    key: States,
    *args: Any,
    paged_step: SplitStep,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`paged_attention` with the plans of the device of the layer's pool."""
    step = paged_step.on[key.device]
    return paged_attention(module, query, key, *args, paged_step=step, **kwargs)


AttentionInterface.register(SPLIT_ATTENTION_NAME, split_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(SPLIT_ATTENTION_NAME, no_mask)
