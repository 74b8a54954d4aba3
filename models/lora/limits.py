"""How many adapters a step may have, up to which rank, and the device memory of their slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..settings.runner_config import RunnerConfig
from ..tensor_parallel.plan import Side
from ..weights.device_choice import choose_device, cpu_has_bfloat16
from ..weights.tensor_loader import RankShare
from .sites import groups_of, linear_shapes, part_of


@dataclass(slots=True, frozen=True)
class AdapterLimits:
    """max_loras: adapters of one step; max_rank: the highest rank; dtype: of their weights."""

    max_loras: int
    max_rank: int
    dtype: torch.dtype


def limits_of(config: RunnerConfig, dtype: torch.dtype) -> AdapterLimits | None:
    """The limits in the settings; None without adapters. dtype: in which the model computes."""
    if config.max_loras == 0:
        return None
    is_auto = config.lora_dtype == "auto"
    named = _fastest(config.device, dtype) if is_auto else getattr(torch, config.lora_dtype)
    return AdapterLimits(config.max_loras, config.max_lora_rank, named)


def _fastest(device: str, dtype: torch.dtype) -> torch.dtype:
    """The type of the weights for a model that computes in `dtype`.

    float32 on a CPU that does not multiply `dtype` itself: products of few rows are several times
    faster, and the weights are small beside the model's.
    """
    if choose_device(device).type != "cpu":
        return dtype
    return dtype if dtype == torch.bfloat16 and cpu_has_bfloat16() else torch.float32


def slot_bytes(
    meta_model: nn.Module, share: RankShare, limits: AdapterLimits | None
) -> dict[str, int]:
    """Bytes of the slots by the model's parts, on one rank; of a decoder with joined products.

    meta_model: the whole model. A decoder of transformers' layers needs less.
    """
    if limits is None:
        return {}
    shapes, sizes = linear_shapes(meta_model), dict[str, int]()
    for names in groups_of(list(shapes)):
        first = names[0]
        num_in = shapes[first][1] // (share.size if share.sides.get(first) is Side.IN else 1)
        num_out = sum(
            shapes[name][0] // (share.size if share.sides.get(name) is Side.OUT else 1)
            for name in names
        )
        ranks = limits.max_loras * len(names) * limits.max_rank
        part = part_of(first)
        sizes[part] = sizes.get(part, 0) + ranks * (num_in + num_out) * limits.dtype.itemsize
    return sizes
