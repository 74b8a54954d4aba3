"""The step that takes the most memory: as a batch to run, and what it takes on a GPU.

Owns the batch's composition. Knows nothing of pools' sizes or of how memory is shared out; what a
step takes by arithmetic, without running it, is in estimate.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..attention.choice import Choice
from ..batch import (
    CrossSegment,
    ImageTiles,
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
from ..kv_cache.pool_sizes import PoolPlan
from ..weights.loader import LoadedModel

# all that sampling can be asked for at once
_COSTLY = SamplingParams(temperature=1.0, top_p=0.9, min_p=0.01, num_logprobs=20)


@dataclass(slots=True, frozen=True)
class StepLimits:
    """The most that one step computes. max_model_len: tokens of the longest sequence."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_batched_images: int
    max_model_len: int


def probe_plan(max_num_tiles: int, block_size: int, max_model_len: int) -> PoolPlan:
    """The smallest pools that `peak_batch` runs on: its sequences share one block of text."""
    return PoolPlan(PoolSizes(1, max_num_tiles, block_size), max_model_len)


def peak_batch(info: ModelInfo, limits: StepLimits) -> StepBatch:
    """The costliest step within the limits, on the pools of `probe_plan`.

    One prompt's last chunk takes the tokens that single ones of the other sequences leave; all are
    as long as they may be, all are sampled, and the chunk's log-probabilities are told. Its blocks
    are the same one over and over: what is computed means nothing, and takes what it would take.
    """
    num_rows = max(1, min(limits.max_num_seqs, limits.max_num_batched_tokens))
    chunk = min(limits.max_num_batched_tokens - num_rows + 1, limits.max_model_len)
    tiles = list(range(info.max_num_tiles))
    images = [ImageToEncode(_blank(info), tiles) for _ in range(limits.max_num_batched_images)]
    seen = tiles * limits.max_num_batched_images
    first = _sequence("first", chunk, limits.max_model_len, info.pools.block_size, seen)
    first.prompt = PromptTargets(0, [0] * chunk, 20)
    others = [
        _sequence(f"other-{row}", 1, limits.max_model_len, info.pools.block_size, tiles)
        for row in range(1, num_rows)
    ]
    return StepBatch(sequences=[first, *others], images=images)


def _blank(info: ModelInfo) -> ImageTiles:
    size = info.tile_size
    return ImageTiles(
        data=bytes(info.max_num_tiles * 3 * size * size),
        num_tiles=info.max_num_tiles,
        tile_size=size,
        aspect_ratio_id=1,
        content_hash=b"",
    )


def _sequence(
    name: str, num_tokens: int, length: int, block_size: int, seen: Sequence[int]
) -> ScheduledSequence:
    """The last tokens of a sequence of that length."""
    return ScheduledSequence(
        request_id=name,
        token_ids=[0] * num_tokens,
        start=length - num_tokens,
        block_ids=[0] * -(-length // block_size),
        segments=[CrossSegment(num_tokens, list(seen))],
        sampling=_COSTLY,
        sample_index=0,
    )


def measure_peak(
    loaded: LoadedModel, attention: Choice, limits: StepLimits, with_graphs: bool = False
) -> dict[torch.device, int]:
    """Bytes that the costliest step takes of each CUDA device, by running it.

    What torch reserves is counted, as that is what others cannot have. with_graphs: decode steps
    will be recorded, whose memory nobody else has either; it is added. Raises StepTooLargeError
    where the step runs out of memory beside the weights.
    """
    devices = [one for one in loaded.placement.devices() if one.type == "cuda"]
    max_num_tiles = int(loaded.model.model.vision_model.max_num_tiles)
    plan = probe_plan(max_num_tiles, attention.block_size, limits.max_model_len)
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
    peaks = {one: torch.cuda.max_memory_reserved(one) - before[one] for one in devices}
    if with_graphs:
        (only,) = devices  # a model over several is never recorded
        peaks[only] += _graph_bytes(runner, limits.max_num_seqs, only)
    del runner
    torch.cuda.empty_cache()
    return peaks


def _graph_bytes(runner: ModelRunner, max_num_seqs: int, device: torch.device) -> int:
    """What the recorded decode steps take, the driver's part included, by recording them.

    0 where that fails: it will again, and decode steps then run eager.
    """
    torch.cuda.empty_cache()
    before, _ = torch.cuda.mem_get_info(device)
    try:
        runner.record_graphs(max_num_seqs, CudaRecorder(device))
    except RuntimeError:
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    after, _ = torch.cuda.mem_get_info(device)
    return max(0, before - after)
