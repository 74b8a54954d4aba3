"""The step that takes the most memory: builds it as a batch, and measures it on a GPU.

`estimate.py` computes the same step's memory without running it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..attention.choice import ChosenBackend
from ..batch import (
    ImageToEncode,
    ModelInfo,
    PoolSizes,
    PromptTargets,
    SamplingParams,
    ScheduledSequence,
    StepBatch,
)
from ..errors import StepTooLargeError
from ..execution.graphs.recorder import CudaRecorder
from ..execution.runner import ModelRunner
from ..execution.warm_up import blank_image, probe_sequence
from ..kv_cache.pool_sizes import PoolPlan
from ..weights.loader import LoadedModel

# top_k and top_p would take less: they reduce a row to its best tokens
_COSTLY = SamplingParams(temperature=1.0, min_p=0.01, num_logprobs=20)


@dataclass(slots=True, frozen=True)
class StepLimits:
    """The most that one step computes. max_model_len: tokens of the longest sequence."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_batched_images: int
    max_model_len: int


def probe_plan(
    max_num_tiles: int, block_size: int, max_model_len: int, has_int8_images: bool = False
) -> PoolPlan:
    """The smallest pools that `peak_batch` runs on: its sequences share one block of text."""
    return PoolPlan(PoolSizes(1, max_num_tiles, block_size, has_int8_images), max_model_len)


def peak_batch(info: ModelInfo, limits: StepLimits) -> StepBatch:
    """The costliest step within the limits, on the pools of `probe_plan`.

    One token of each other sequence; the rest is one prompt's last chunk, with its
    log-probabilities. All sequences have the full length and are sampled. They share one block: the
    results mean nothing, but the step takes as much memory as a real one.
    """
    num_rows = max(1, min(limits.max_num_seqs, limits.max_num_batched_tokens))
    chunk = min(limits.max_num_batched_tokens - num_rows + 1, limits.max_model_len)
    tiles = list(range(info.max_num_tiles))
    images = [ImageToEncode(blank_image(info), tiles) for _ in range(limits.max_num_batched_images)]
    seen = tiles * limits.max_num_batched_images

    def sequence(name: str, num_tokens: int, seen: Sequence[int]) -> ScheduledSequence:
        size, length = info.pools.block_size, limits.max_model_len
        return probe_sequence(name, num_tokens, length, size, seen, _COSTLY)

    first = sequence("first", chunk, seen)
    first.prompt = PromptTargets(0, [0] * chunk, 20)
    others = [sequence(f"other-{row}", 1, tiles) for row in range(1, num_rows)]
    return StepBatch(sequences=[first, *others], images=images)


def measure_peak(
    loaded: LoadedModel, attention: ChosenBackend, limits: StepLimits, with_graphs: bool = False
) -> dict[torch.device, int]:
    """Bytes that the costliest step takes on each CUDA device, by running it.

    Counts what torch reserves, since nothing else can use that. with_graphs: add the memory of the
    recorded decode steps. Raises StepTooLargeError if the step runs out of memory.
    """
    devices = [device for device in loaded.placement.devices() if device.type == "cuda"]
    max_num_tiles = int(loaded.model.model.vision_model.max_num_tiles)
    size, length = attention.block_size, limits.max_model_len
    plan = probe_plan(max_num_tiles, size, length, attention.has_int8_images)
    runner = ModelRunner(loaded, plan, attention.backend)
    torch.cuda.empty_cache()
    before = {}
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
        before[device] = torch.cuda.memory_reserved(device)
    try:
        runner.execute(peak_batch(runner.info, limits))
    except torch.OutOfMemoryError:
        raise StepTooLargeError(
            f"a step of {limits.max_num_batched_tokens:,} tokens, {limits.max_num_batched_images} "
            f"images and {limits.max_num_seqs} sequences does not fit beside the weights: lower "
            "--max-num-batched-images, --max-num-batched-tokens or --max-num-seqs, or --quantize"
        ) from None
    peaks = {device: torch.cuda.max_memory_reserved(device) - before[device] for device in devices}
    if with_graphs:
        (only,) = devices  # a model on several devices is never recorded
        peaks[only] += _graph_bytes(runner, limits.max_num_seqs, only)
    del runner
    torch.cuda.empty_cache()
    return peaks


def _graph_bytes(runner: ModelRunner, max_num_seqs: int, device: torch.device) -> int:
    """The memory of the recorded decode steps, the driver's included, by recording them.

    0 if recording fails: it will fail again, and decode steps then run eager.
    """
    torch.cuda.empty_cache()
    before, _ = torch.cuda.mem_get_info(device)
    try:
        runner.record_graphs(max_num_seqs, CudaRecorder(device))
    except Exception:  # triton and its compilers raise types of their own
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    after, _ = torch.cuda.mem_get_info(device)
    return max(0, before - after)
