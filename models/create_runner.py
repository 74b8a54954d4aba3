"""From an engine's settings to a runner: places the model, refuses what cannot fit, sizes pools.

Owns the order of these, and the line that says where memory goes. Knows nothing of how any of them
is done.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .attention.choice import Choice, choose_backend
from .byte_text import shown_bytes
from .errors import ModelError, StepTooLargeError
from .execution.graphs.eligibility import why_not
from .execution.graphs.recorder import CudaRecorder
from .execution.runner import ModelRunner, set_threads
from .kv_cache.paged_cache import tile_bytes, token_bytes
from .kv_cache.pool_sizes import PoolPlan, PoolRequest, plan_over_devices, wanted_len
from .malloc import keep_freed_buffers
from .memory.available import Room, RoomOf, room_of
from .memory.estimate import peak_bytes
from .memory.fit import LEAST_TEXT_TOKENS, Plan, check_fits, needs_of, peak_on, share_of
from .memory.peak_step import StepLimits, measure_peak
from .settings.runner_config import RunnerConfig
from .tensor_parallel.group import Group
from .weights.device_map import (
    AUTO,
    BALANCED,
    CPU,
    Place,
    Placement,
    automatic,
    device_at,
    on_one_device,
    read_device_map,
)
from .weights.loader import (
    Checkpoint,
    LoadedModel,
    choose_device,
    choose_dtype,
    load,
    open_checkpoint,
    share_with,
)
from .weights.meta_model import one_line
from .weights.tensor_loader import RankShare

logger = logging.getLogger(__name__)


def create_runner(
    model: str | Checkpoint,
    config: RunnerConfig,
    *,
    rooms: RoomOf | None = None,
    group: Group | None = None,
) -> ModelRunner:
    """The runner of a local checkpoint folder, loaded and with its pools allocated.

    model: the folder, or an opened checkpoint, which has its dtype already. group: tensor-parallel
    ranks; every rank calls this with the same arguments. rooms: the free memory of each device;
    None asks the devices. Raises ModelError, one line with the remedy, before a weight is read if
    the model cannot fit. Shows progress on stderr.
    """
    set_threads(config.num_threads)
    chosen = choose_device(config.device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # of this thread, which computes too: triton launches there
    if isinstance(model, Checkpoint):
        checkpoint = model
    else:
        checkpoint = open_checkpoint(model, choose_dtype(config.dtype, chosen))
    share = share_with(checkpoint, group)
    plan = _plan(checkpoint, config, share)
    rooms = rooms or partial(
        room_of,
        gpu_memory_utilization=config.gpu_memory_utilization,
        num_sharers=config.num_sharers,
    )
    max_memory = config.max_memory
    bounded = rooms if max_memory is None else partial(_bounded, rooms, max_memory)
    placement = _place(plan, chosen, config.device_map, max_memory, bounded)
    check_fits(plan, placement, bounded)
    before = {one: bounded(one).num_bytes for one in placement.devices()}
    loaded = load(checkpoint, placement, config.quantize, group=group)
    attention = choose_backend(config.attention_backend, loaded.geometry, config.block_size)
    plan = replace(plan, pools=replace(plan.pools, block_size=attention.block_size))
    reason = why_not(loaded, attention.backend, config.cuda_graphs)
    rest = _Rooms(rooms, before)
    sized = _size_pools(plan, loaded, attention, rest, group, with_graphs=reason is None)
    runner = ModelRunner(loaded, sized, attention.backend)
    reason = reason or _record_graphs(runner, config.max_num_seqs, loaded.device)
    if reason is not None:
        logger.info("decode graphs: none (%s)", reason)
    keep_freed_buffers()  # not earlier: pools take memory only as they are written
    return runner


def _record_graphs(runner: ModelRunner, max_num_seqs: int, device: torch.device) -> str | None:
    """Record decode steps and tell the log; why they run eager where that fails."""
    start = time.monotonic()
    try:
        graphs = runner.record_graphs(max_num_seqs, CudaRecorder(device))
    except RuntimeError as error:  # whatever CUDA or triton refuses
        return f"recording them failed: {one_line(error)}"
    torch.cuda.empty_cache()  # what was tried on the recorder's stream, no other one can use
    logger.info(
        "decode graphs: %d, of up to %d sequences, recorded in %.1f s",
        graphs.num_graphs,
        graphs.most_rows,
        time.monotonic() - start,
    )
    return None


def _plan(checkpoint: Checkpoint, config: RunnerConfig, share: RankShare) -> Plan:
    """The limits of a step and the request for pools, from a rank's share and the settings."""
    model_config: Any = checkpoint.skeleton.config
    text = model_config.text_config
    num_patches = int(checkpoint.skeleton.model.vision_model.num_patches)
    pools = PoolRequest(
        context_len=text.max_position_embeddings,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_tiles=model_config.vision_config.max_num_tiles,
        block_size=config.block_size or 1,
        num_text_blocks=config.num_text_blocks,
        num_image_blocks=config.num_image_blocks,
        token_bytes=token_bytes(text, checkpoint.dtype) // share.size,
        tile_bytes=tile_bytes(text, num_patches, checkpoint.dtype) // share.size,
    )
    limits = StepLimits(
        config.max_num_seqs,
        config.max_num_batched_tokens,
        config.max_num_batched_images,
        wanted_len(pools),
    )
    return Plan(checkpoint, limits, pools, config.quantize, config.kv_cache_bytes, share)


def _bounded(rooms: RoomOf, max_memory: Mapping[str, int], device: torch.device) -> Room:
    """A device's room, no more than --max-memory says; none of a device that it does not name."""
    room = rooms(device)
    limit = max_memory.get("cpu" if device.type == "cpu" else str(device.index or 0), 0)
    return room if room.num_bytes <= limit else Room(limit, "by --max-memory")


def _place(
    plan: Plan,
    chosen: torch.device,
    device_map: str | None,
    max_memory: Mapping[str, int] | None,
    rooms: RoomOf,
) -> Placement:
    """Where --device, --device-map and --max-memory put the model's parts."""
    skeleton = plan.checkpoint.skeleton
    num_gpus = torch.cuda.device_count() if chosen.type == "cuda" else 0
    if device_map is None and max_memory is None:
        return on_one_device(skeleton, chosen)
    if device_map not in (None, AUTO, BALANCED):
        if max_memory is not None:
            raise ModelError("--max-memory goes with --device-map auto or balanced, not a file")
        return read_device_map(Path(str(device_map)), skeleton, num_gpus)
    needs = needs_of(plan)
    places: list[Place] = [*range(num_gpus), CPU]
    _check_known(max_memory, places)
    room: dict[Place, int] = {}
    for place in places:
        is_computing = place != CPU or num_gpus == 0
        activations = needs.peak.most if is_computing else 0
        room[place] = max(0, rooms(device_at(place)).num_bytes - activations)
    if plan.quantize is not None and num_gpus:
        del room[CPU]  # quantized weights are not offloaded
    return automatic(device_map or AUTO, needs.weights, room, needs.caches)


def _check_known(max_memory: Mapping[str, int] | None, places: Sequence[Place]) -> None:
    known = [str(place) for place in places]
    for name in max_memory or {}:
        if name not in known:
            raise ModelError(
                f"--max-memory names {name!r}, which is not there: use one of {', '.join(known)}"
            )


@dataclass(slots=True, frozen=True)
class _Rooms:
    """What each device has free now, and had before the weights were read."""

    now: RoomOf
    before: Mapping[torch.device, int]


def _size_pools(
    plan: Plan,
    loaded: LoadedModel,
    attention: Choice,
    rooms: _Rooms,
    group: Group | None,
    with_graphs: bool,
) -> PoolPlan:
    """Both pools from what weights and a peak step leave, or from --kv-cache-memory. ModelError.

    Without --max-model-len the longest sequence is halved until the pools have room beside what a
    step over such a sequence takes. Ranks go by the one with the least room, and so by the same
    way: a measured step has collectives in it.
    """
    length = plan.limits.max_model_len
    shortest = length if plan.pools.max_model_len else min(length, LEAST_TEXT_TOKENS)
    while True:
        limits = replace(plan.limits, max_model_len=length)
        requests = _by_device(replace(plan.pools, context_len=length), loaded)
        try:
            peaks = _peaks(loaded, attention, limits, with_graphs)
            budgets = _budgets(plan, loaded, requests, peaks, rooms)
            budgets = budgets if group is None else group.least(budgets)
            sized = plan_over_devices(list(requests.values()), budgets)
        except ModelError as error:
            # other ranks are in the middle of a step that was too large for this one
            is_alone = group is not None and isinstance(error, StepTooLargeError)
            if length <= shortest or is_alone:
                raise
        else:
            if sized.max_model_len >= shortest or length <= shortest:
                _tell(plan, loaded, peaks, requests, sized)
                return sized
        length = max(shortest, length // 2)


def _peaks(
    loaded: LoadedModel, attention: Choice, limits: StepLimits, with_graphs: bool
) -> dict[torch.device, int]:
    """What a step's activations take of each device: measured on GPUs, else by arithmetic.

    with_graphs: the recorded decode steps are added.
    """
    devices = loaded.placement.devices()
    if any(device.type == "cuda" for device in devices):
        return measure_peak(loaded, attention, limits, with_graphs)
    peak = peak_bytes(loaded.model.config, limits, loaded.dtype)
    return {device: peak_on(loaded.placement, peak, device) for device in devices}


def _by_device(pools: PoolRequest, loaded: LoadedModel) -> dict[torch.device, PoolRequest]:
    """The request as it is for each device that has layers, in the bytes of its own layers."""
    config = loaded.text_config
    cross = set(config.cross_attention_layers or ())
    num_self = max(1, config.num_hidden_layers - len(cross))
    requests = {}
    devices = loaded.placement.layer_devices()
    for device in dict.fromkeys(devices):
        own = [index for index, one in enumerate(devices) if one == device]
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
    rooms: _Rooms,
) -> list[int]:
    """The bytes for both pools on each device."""
    if plan.kv_cache_bytes is not None:
        whole = plan.pools.token_bytes + plan.pools.tile_bytes
        return [
            plan.kv_cache_bytes * (one.token_bytes + one.tile_bytes) // whole
            for one in requests.values()
        ]
    return [max(0, _left(one, loaded, plan, rooms) - peaks[one]) for one in requests]


def _left(device: torch.device, loaded: LoadedModel, plan: Plan, rooms: _Rooms) -> int:
    """What a device has beside the weights."""
    share = share_of(loaded.placement, needs_of(plan), device)
    # weights that are pages of a file count as available still: take them off what was before
    left = min(rooms.now(device).num_bytes, rooms.before[device] - share.resident_bytes)
    # a measured peak has seen the visitors
    return left - share.visitor if device.type == "cpu" else left


def _tell(
    plan: Plan,
    loaded: LoadedModel,
    peaks: Mapping[torch.device, int],
    requests: Mapping[torch.device, PoolRequest],
    sized: PoolPlan,
) -> None:
    """A line of the log for each device: where its memory goes."""
    sizes, needs = sized.sizes, needs_of(plan)
    num_tokens = sizes.num_text_blocks * sizes.block_size
    for device, own in requests.items():
        weights = share_of(loaded.placement, needs, device).resident_bytes
        logger.info(
            "memory of %s: weights %s, activations of a step %s, text pool %s (%s tokens), image "
            "pool %s (%s tiles)",
            device,
            shown_bytes(weights),
            shown_bytes(peaks[device]),
            shown_bytes(num_tokens * own.token_bytes),
            f"{num_tokens:,}",
            shown_bytes(sizes.num_image_blocks * own.tile_bytes),
            f"{sizes.num_image_blocks:,}",
        )
