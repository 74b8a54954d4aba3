"""From an engine's settings to a runner: place the model, check that it fits, load it, size pools.

Owns this order and the defaults of the options.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from .attention.choice import choose_backend
from .errors import ModelError
from .execution.graphs.eligibility import agreed, why_not, why_not_over, why_not_with
from .execution.graphs.recorder import CudaRecorder
from .execution.runner import ModelRunner
from .execution.shared_cores import CoreUse, SharedCores
from .execution.warm_up import warm_up
from .kernels import c_library
from .kernels.float32_products import widens
from .kv_cache.pool_sizes import PoolPlan
from .malloc import SLACK_BYTES, keep_freed_buffers, private_bytes
from .memory.available import AvailableMemory, AvailableMemoryOf, available_memory
from .memory.fit import Plan, check_fits, needs_of, peak_of, plan_of
from .memory.peak_step import StepLimits
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
    LoadedModel,
    load,
    open_checkpoint,
    share_with,
)
from .weights.meta_model import one_line

logger = logging.getLogger(__name__)


def set_threads(num_threads: int | None) -> None:
    """Set torch's number of threads; None leaves one core to HTTP and image decoding.

    With two cores torch takes both: HTTP needs the second for only a few milliseconds a step, and
    the model computes a third faster with it (docs/benchmarks.md). If the user sets
    OMP_NUM_THREADS, None changes nothing.
    """
    if num_threads is None and "OMP_NUM_THREADS" in os.environ:
        return
    num_cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(num_threads or (num_cores if num_cores <= 2 else num_cores - 1))


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
    with c_library.allowed(config.cpu_products == "auto"):
        return _create(model, config, available, group)


def _create(
    model: str | Checkpoint,
    config: RunnerConfig,
    available: AvailableMemoryOf | None,
    group: Group | None,
) -> ModelRunner:
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
    is_widened = widens(checkpoint.dtype, chosen)
    plan = replace(plan, is_widened=is_widened, has_inserted=chosen.type == "cpu")
    available = available or _free_memory(config)
    max_memory = config.max_memory
    bounded = available if max_memory is None else partial(_bounded, available, max_memory)
    placement = _place(plan, chosen, config.device_map, max_memory, bounded)
    check_fits(plan, placement, bounded)
    before = {device: bounded(device).num_bytes for device in placement.devices()}
    loaded = load(checkpoint, placement, config.quantize, group=group)
    reason = _why_no_graphs(loaded, config, group)
    geometry = replace(loaded.geometry, has_int8_images=config.has_int8_images)
    attention = choose_backend(
        config.attention_backend, geometry, config.block_size, with_graphs=reason is None
    )
    plan = replace(plan, pools=replace(plan.pools, block_size=attention.block_size))
    reason = reason or why_not_with(attention.backend)
    if group is not None:
        reason = agreed(group, reason)  # a rank's trial may have chosen another backend
    readings = MemoryReadings(available, before)
    sized = size_pools(plan, loaded, attention, readings, group, with_graphs=reason is None)
    runner = ModelRunner(loaded, sized, attention.backend, plan.adapters)
    if loaded.device.type == "cuda":
        _warm_up(runner, plan.limits, checkpoint.dtype)
    reason = reason or _record_graphs(runner, config.max_num_seqs, loaded.device, group)
    if reason is not None:
        logger.info("decode graphs: none (%s)", reason)
    if runner.grammars.unsupported is not None:
        logger.warning("requests with a grammar are rejected: %s", runner.grammars.unsupported)
    keep_freed_buffers()  # last, because pools take memory only when they are written
    if loaded.device.type == "cpu":
        runner.bound_memory(_most_bytes(plan, sized))
        runner.cores = _shared_cores(config, group)
    return runner


def _shared_cores(config: RunnerConfig, group: Group | None) -> SharedCores | None:
    """Chooses the threads of each step; None if the user chose them, or if there is no choice."""
    is_chosen = config.num_threads is not None or "OMP_NUM_THREADS" in os.environ
    most = torch.get_num_threads()
    if is_chosen or group is not None or most == 1:
        return None
    num_cores = len(os.sched_getaffinity(0))
    return SharedCores(most, num_cores, torch.set_num_threads, CoreUse().of_others)


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
    now, step = private_bytes(), peak_of(plan, limits).most
    caches = text_bytes + image_bytes
    # slots, and as much in host memory
    adapters = 2 * sum(needs_of(plan).adapters.values())
    most = now + caches + step + adapters + SLACK_BYTES
    logger.info(
        "this process takes at most %s: %s now, caches %s, a step %s, others %s%s",
        *map(shown_bytes, (most, now, caches, step, SLACK_BYTES)),
        f", adapters {shown_bytes(adapters)}" if adapters else "",
    )
    return most


def _why_no_graphs(loaded: LoadedModel, config: RunnerConfig, group: Group | None) -> str | None:
    """Why decode steps cannot be recorded, the same on every rank. Waits for all ranks."""
    if group is not None:
        group.has_loaded()
    reason = why_not(loaded, config.cuda_graphs)
    if group is None or reason is not None:
        return reason
    return why_not_over(group, CudaRecorder(loaded.device), loaded.device)


def _warm_up(runner: ModelRunner, limits: StepLimits, dtype: torch.dtype) -> None:
    """Launch every kernel once. Raises ModelError if one fails."""
    start = time.monotonic()
    try:
        num_steps = warm_up(runner, limits.max_num_seqs, limits.max_num_batched_tokens)
        if runner.adapters is not None:
            runner.adapters.warm_up(dtype)
    except Exception as error:  # triton and its compilers raise types of their own
        raise ModelError(
            f"a step failed while kernels were compiled: {one_line(error)}; try "
            "--attention-backend sdpa"
        ) from error
    logger.info("kernels compiled by %d steps in %.1f s", num_steps, time.monotonic() - start)


def _record_graphs(
    runner: ModelRunner, max_num_seqs: int, device: torch.device, group: Group | None = None
) -> str | None:
    """Record decode steps and log it. Returns the reason if recording fails, on any rank."""
    start, reason = time.monotonic(), None
    try:
        graphs = runner.record_graphs(max_num_seqs, CudaRecorder(device))
    except Exception as error:  # triton and its compilers raise types of their own
        reason = f"recording failed: {one_line(error)}"
    if group is not None:
        reason = agreed(group, reason)
    if reason is not None:
        runner.forget_graphs()
        return reason
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
    return automatic(device_map or AUTO, needs.weights, limits, needs.beside_weights)


def _check_known(max_memory: Mapping[str, int] | None, places: Sequence[Place]) -> None:
    known = [str(place) for place in places]
    for name in max_memory or {}:
        if name not in known:
            raise ModelError(f"--max-memory names unknown device {name!r}: use {', '.join(known)}")
