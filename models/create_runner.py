"""From an engine's settings to a runner: place the model, check that it fits, load it, size pools.

Owns this order and the defaults of the options.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from .attention.choice import choose_backend
from .errors import ModelError
from .execution.graphs.eligibility import why_not, why_not_with
from .execution.graphs.recorder import CudaRecorder
from .execution.runner import ModelRunner, set_threads
from .kv_cache.pool_sizes import PoolPlan
from .malloc import SLACK_BYTES, keep_freed_buffers, private_bytes
from .memory.available import AvailableMemory, AvailableMemoryOf, available_memory
from .memory.estimate import peak_bytes
from .memory.fit import Plan, check_fits, needs_of, plan_of
from .memory.sizing import MemoryReadings, size_pools
from .settings.byte_text import shown_bytes
from .settings.runner_config import RunnerConfig
from .tensor_parallel.group import Group
from .weights.device_choice import choose_device, choose_dtype
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
    load,
    open_checkpoint,
    share_with,
)
from .weights.meta_model import one_line

logger = logging.getLogger(__name__)


def create_runner(
    model: str | Checkpoint,
    config: RunnerConfig,
    *,
    available: AvailableMemoryOf | None = None,
    group: Group | None = None,
) -> ModelRunner:
    """The runner of a local checkpoint folder, with its weights loaded and its pools allocated.

    model: the folder, or an opened checkpoint, which has its dtype already. group: tensor-parallel
    ranks; every rank calls this with the same arguments. available: reads a device's free memory;
    tests pass their own. Raises ModelError, one line with the remedy, before a weight is read if
    the model cannot fit. Shows progress on stderr.
    """
    set_threads(config.num_threads)
    chosen = choose_device(config.device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # for this thread: triton launches on the current device
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32 in the patch embedding too
    checkpoint = model
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint, choose_dtype(config.dtype, chosen))
    share = share_with(checkpoint, group)
    plan = plan_of(checkpoint, config, share)
    available = available or _free_memory(config)
    max_memory = config.max_memory
    bounded = available if max_memory is None else partial(_bounded, available, max_memory)
    placement = _place(plan, chosen, config.device_map, max_memory, bounded)
    check_fits(plan, placement, bounded)
    before = {device: bounded(device).num_bytes for device in placement.devices()}
    loaded = load(checkpoint, placement, config.quantize, group=group)
    reason = why_not(loaded, config.cuda_graphs)
    attention = choose_backend(
        config.attention_backend, loaded.geometry, config.block_size, with_graphs=reason is None
    )
    plan = replace(plan, pools=replace(plan.pools, block_size=attention.block_size))
    reason = reason or why_not_with(attention.backend)
    readings = MemoryReadings(available, before)
    sized = size_pools(plan, loaded, attention, readings, group, with_graphs=reason is None)
    runner = ModelRunner(loaded, sized, attention.backend)
    reason = reason or _record_graphs(runner, config.max_num_seqs, loaded.device)
    if reason is not None:
        logger.info("decode graphs: none (%s)", reason)
    keep_freed_buffers()  # last, because pools take memory only when they are written
    if loaded.device.type == "cpu":
        runner.bound_memory(_most_bytes(plan, sized))
    return runner


def _free_memory(config: RunnerConfig) -> AvailableMemoryOf:
    """Reads the memory of a device that this runner may use."""
    return partial(
        available_memory,
        gpu_memory_utilization=config.gpu_memory_utilization,
        num_sharers=config.num_sharers,
    )


def _most_bytes(plan: Plan, sized: PoolPlan) -> int:
    """The memory of a CPU's process: what it has now, both pools in full, a step, and a slack."""
    sizes, pools = sized.sizes, plan.pools
    text_bytes = sizes.num_text_blocks * sizes.block_size * pools.token_bytes
    image_bytes = sizes.num_image_blocks * pools.tile_bytes
    limits = replace(plan.limits, max_model_len=sized.max_model_len)
    config, dtype = plan.checkpoint.meta_model.config, plan.checkpoint.dtype
    now, step = private_bytes(), peak_bytes(config, limits, dtype).most
    logger.info(
        "this process takes at most %s: %s now, caches %s, a step %s, others %s",
        *map(shown_bytes, (now + text_bytes + image_bytes + step + SLACK_BYTES, now,
                           text_bytes + image_bytes, step, SLACK_BYTES)),
    )  # fmt: skip
    return now + text_bytes + image_bytes + step + SLACK_BYTES


def _record_graphs(runner: ModelRunner, max_num_seqs: int, device: torch.device) -> str | None:
    """Record decode steps and log it. Returns the reason if recording fails."""
    start = time.monotonic()
    try:
        graphs = runner.record_graphs(max_num_seqs, CudaRecorder(device))
    except Exception as error:  # triton and its compilers raise types of their own
        return f"recording failed: {one_line(error)}"
    torch.cuda.empty_cache()  # only the recorder's stream could use the warm-up's memory
    logger.info(
        "decode graphs: %d, of up to %d sequences, recorded in %.1f s",
        graphs.num_graphs,
        graphs.most_rows,
        time.monotonic() - start,
    )
    return None


def _bounded(
    available: AvailableMemoryOf, max_memory: Mapping[str, int], device: torch.device
) -> AvailableMemory:
    """A device's memory, limited by --max-memory; 0 for a device that the option does not name."""
    memory = available(device)
    limit = max_memory.get("cpu" if device.type == "cpu" else str(device.index or 0), 0)
    return memory if memory.num_bytes <= limit else AvailableMemory(limit, "by --max-memory")


def _place(
    plan: Plan,
    chosen: torch.device,
    device_map: str | None,
    max_memory: Mapping[str, int] | None,
    available: AvailableMemoryOf,
) -> Placement:
    """The placement that --device, --device-map and --max-memory ask for."""
    meta_model = plan.checkpoint.meta_model
    num_gpus = torch.cuda.device_count() if chosen.type == "cuda" else 0
    if device_map is None and max_memory is None:
        return on_one_device(meta_model, chosen)
    if device_map not in (None, AUTO, BALANCED):
        if max_memory is not None:
            raise ModelError("--max-memory needs --device-map auto or balanced, not a file")
        return read_device_map(Path(str(device_map)), meta_model, num_gpus)
    needs = needs_of(plan)
    places: list[Place] = [*range(num_gpus), CPU]
    _check_known(max_memory, places)
    limits: dict[Place, int] = {}
    for place in places:
        is_computing = place != CPU or num_gpus == 0
        activations = needs.peak.most if is_computing else 0
        limits[place] = max(0, available(device_at(place)).num_bytes - activations)
    if plan.quantize is not None and num_gpus:
        del limits[CPU]  # quantized weights cannot be offloaded
    return automatic(device_map or AUTO, needs.weights, limits, needs.caches)


def _check_known(max_memory: Mapping[str, int] | None, places: Sequence[Place]) -> None:
    known = [str(place) for place in places]
    for name in max_memory or {}:
        if name not in known:
            raise ModelError(f"--max-memory names unknown device {name!r}: use {', '.join(known)}")
