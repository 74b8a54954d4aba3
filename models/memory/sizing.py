"""Sizes both pools from the memory that the weights and the largest step leave on each device.

Owns the split over devices and ranks, the shrinking of the context, and the log line that shows
where memory goes. `kv_cache/pool_sizes.py` splits one device's bytes between text and images.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ..attention.choice import ChosenBackend
from ..errors import ModelError, StepTooLargeError
from ..kernels.float32_products import widens
from ..kv_cache.pool_sizes import PoolPlan, PoolRequest, plan_over_devices
from ..settings.byte_text import shown_bytes
from ..tensor_parallel.group import Group
from ..weights.loader import LoadedModel
from .available import AvailableMemoryOf
from .estimate import peak_bytes
from .fit import LEAST_TEXT_TOKENS, Plan, needs_of, needs_on, peak_on
from .peak_step import StepLimits, measure_peak

logger = logging.getLogger(__name__)


@dataclass(slots=True, frozen=True)
class MemoryReadings:
    """What each device has available: `now`, and in bytes `before` the weights were read."""

    now: AvailableMemoryOf
    before: Mapping[torch.device, int]


def size_pools(
    plan: Plan,
    loaded: LoadedModel,
    attention: ChosenBackend,
    readings: MemoryReadings,
    group: Group | None,
    with_graphs: bool,
) -> PoolPlan:
    """Both pools, from free memory or from --kv-cache-memory. Raises ModelError.

    Without --max-model-len the context is halved until the pools and a step over it fit. All ranks
    use the smallest rank's budget, so all take the same path: a measured step has collectives.
    """
    length = plan.limits.max_model_len
    shortest = length if plan.pools.max_model_len else min(length, LEAST_TEXT_TOKENS)
    while True:
        limits = replace(plan.limits, max_model_len=length)
        requests = _requests_by_device(replace(plan.pools, context_len=length), loaded)
        try:
            peaks = peaks_by_device(loaded, attention, limits, with_graphs)
            budgets = _budgets(plan, loaded, requests, peaks, readings)
            budgets = budgets if group is None else group.least(budgets)
            sized = plan_over_devices(list(requests.values()), budgets)
        except ModelError as error:
            # the step ran out of memory on this rank only; the others are still computing it
            is_out_of_step = group is not None and isinstance(error, StepTooLargeError)
            if length <= shortest or is_out_of_step:
                raise
        else:
            if sized.max_model_len >= shortest or length <= shortest:
                _log_memory(plan, loaded, peaks, requests, sized)
                return sized
        length = max(shortest, length // 2)


def peaks_by_device(
    loaded: LoadedModel, attention: ChosenBackend, limits: StepLimits, with_graphs: bool
) -> dict[torch.device, int]:
    """Bytes of a step's activations on each device: measured on GPUs, else estimated.

    with_graphs: add the memory of the recorded decode steps.
    """
    devices = loaded.placement.devices()
    if any(device.type == "cuda" for device in devices):
        return measure_peak(loaded, attention, limits, with_graphs)
    config, dtype = loaded.model.config, loaded.dtype
    is_widened = widens(dtype, loaded.device)
    peak = peak_bytes(config, limits, dtype, is_widened=is_widened, has_inserted=True)
    return {device: peak_on(loaded.placement, peak, device) for device in devices}


def _requests_by_device(pools: PoolRequest, loaded: LoadedModel) -> dict[torch.device, PoolRequest]:
    """The request for each device that has layers, in the bytes of its own layers."""
    config = loaded.text_config
    cross = set(config.cross_attention_layers or ())
    num_self = max(1, config.num_hidden_layers - len(cross))
    requests = {}
    layer_devices = loaded.placement.layer_devices()
    for device in dict.fromkeys(layer_devices):
        own = [index for index, other in enumerate(layer_devices) if other == device]
        own_cross = sum(index in cross for index in own)
        requests[device] = replace(
            pools,
            token_bytes=pools.token_bytes * (len(own) - own_cross) // num_self,
            tile_bytes=pools.tile_bytes * own_cross // max(1, len(cross)),
        )
    return requests


def _budgets(
    plan: Plan,
    loaded: LoadedModel,
    requests: Mapping[torch.device, PoolRequest],
    peaks: Mapping[torch.device, int],
    readings: MemoryReadings,
) -> list[int]:
    """The bytes for both pools on each device."""
    if plan.kv_cache_bytes is not None:
        whole = plan.pools.token_bytes + plan.pools.tile_bytes
        return [
            plan.kv_cache_bytes * (request.token_bytes + request.tile_bytes) // whole
            for request in requests.values()
        ]
    return [
        max(0, _left_bytes(device, loaded, plan, readings) - peaks[device]) for device in requests
    ]


def _left_bytes(
    device: torch.device, loaded: LoadedModel, plan: Plan, readings: MemoryReadings
) -> int:
    """The bytes that the weights leave on a device."""
    needs = needs_on(loaded.placement, needs_of(plan), device)
    # memory-mapped weights still count as available: subtract them from the earlier reading
    left = min(readings.now(device).num_bytes, readings.before[device] - needs.resident_bytes)
    left -= needs.adapters  # allocated later, with the pools
    # a measured peak includes the offloaded weights already
    return left - needs.largest_offloaded if device.type == "cpu" else left


def _log_memory(
    plan: Plan,
    loaded: LoadedModel,
    peaks: Mapping[torch.device, int],
    requests: Mapping[torch.device, PoolRequest],
    sized: PoolPlan,
) -> None:
    """Log one line for each device: how its memory is used."""
    sizes, needs = sized.sizes, needs_of(plan)
    num_tokens = sizes.num_text_blocks * sizes.block_size
    for device, request in requests.items():
        on_device = needs_on(loaded.placement, needs, device)
        logger.info(
            "memory of %s: weights %s, %sactivations of a step %s, text pool %s (%s tokens), image "
            "pool %s (%s tiles%s)",
            device,
            shown_bytes(on_device.resident_bytes),
            _adapters_text(plan, on_device.adapters),
            shown_bytes(peaks[device]),
            shown_bytes(num_tokens * request.token_bytes),
            f"{num_tokens:,}",
            shown_bytes(sizes.num_image_blocks * request.tile_bytes),
            f"{sizes.num_image_blocks:,}",
            " in int8" if sizes.has_int8_images else "",
        )


def _adapters_text(plan: Plan, num_bytes: int) -> str:
    if plan.adapters is None:
        return ""
    limits = plan.adapters
    return f"{limits.max_loras} adapters to rank {limits.max_rank} {shown_bytes(num_bytes)}, "
