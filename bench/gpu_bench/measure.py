"""Measures one row: requests through the scheduler and the runner, as the engine runs them.

Owns requests and the loop of steps. Knows nothing of processes or of which rows there
are. A step's time is from its planning to the next one's: what a client would see.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from vlmserve.models.batch import ImageSpan, ImageTiles, SamplingParams, StepBatch, StepResult
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.router.messages import AddRequest
from vlmserve.router.scheduler.interface import SchedulerLimits
from vlmserve.router.scheduler.request_queue import QueueLimits, RequestQueue
from vlmserve.router.scheduler.scheduler import Scheduler
from vlmserve.router.scheduler.sequence import Sequence

from ..bounds import decode_work, prefill_work, prompt_work
from .clock import Clock
from .plan import INT8, Row, Size
from .products import products

GREEDY = SamplingParams(temperature=0.0)
UNBOUNDED = QueueLimits(max_requests=10**6, max_tokens=10**9, max_bytes=10**12)
IMAGE_TOKENS = 16
PROFILED_STEPS = 3
PROFILED_NAMES = 12
# what a profile's events are called where the host waits for the device, and where it launches
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
LAUNCHES = (
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cudaGraphLaunch",
)


@dataclass(slots=True)
class Step:
    """One step's marks and what it computed; it ends where the next one begins."""

    begin: Any
    executes: Any
    executed: Any
    batch: StepBatch
    result: StepResult


class Loop:
    """Requests of random tokens, and steps that decode them."""

    def __init__(self, runner: ModelRunner, size: Size, num_seqs: int) -> None:
        self._runner, self._size = runner, size
        self._rng = np.random.default_rng(num_seqs)
        self._num_requests = 0
        self.clock = Clock(torch.device(size.device))
        limits = SchedulerLimits(
            max_num_seqs=num_seqs,
            max_num_batched_tokens=max(size.prefill_tokens, num_seqs),
            max_num_batched_images=4,
            max_model_len=runner.info.max_model_len,
            prefix_cache=False,
            image_cache=False,
        )
        self._queue = RequestQueue(UNBOUNDED)
        self._scheduler = Scheduler(runner.info, limits, self._queue)

    def add(self, num_tokens: int, max_tokens: int, has_image: bool) -> None:
        """A request that waits: a prompt of random tokens, greedy, that nothing ends early."""
        info, number = self._runner.info, self._num_requests
        self._num_requests += 1
        token_ids = self._rng.integers(1, info.vocab_size, num_tokens).tolist()
        images = [self._image(number)] if has_image else []
        if has_image:
            token_ids[0] = self._runner.config.image_token_index
        request = AddRequest(
            request_id=str(number),
            prompt_token_ids=token_ids,
            images=images,
            spans=[ImageSpan(0)] * len(images),
            sampling=GREEDY,
            max_tokens=max_tokens,
        )
        for sequence in Sequence.of(0, request):
            self._queue.put(sequence)

    def _image(self, number: int) -> ImageTiles:
        """All tiles that an image may have; the number makes it another image than all others."""
        info = self._runner.info
        shape = (info.max_num_tiles, 3, info.tile_size, info.tile_size)
        # the aspect ratio of 2 x 2 tiles has the id 6 where an image has at most four
        return ImageTiles(
            data=self._rng.integers(0, 256, shape, dtype=np.uint8).tobytes(),
            num_tiles=info.max_num_tiles,
            tile_size=info.tile_size,
            aspect_ratio_id=6,
            content_hash=number.to_bytes(8, "big"),
        )

    def step(self) -> Step:
        """Plan, compute, take in."""
        begin = self.clock.mark()
        batch = self._scheduler.schedule()
        assert batch is not None, "the requests ended before they were measured"
        executes = self.clock.mark()
        result = self._runner.execute(batch, self._plan_ahead)
        executed = self.clock.mark()
        self._scheduler.update(result)
        return Step(begin, executes, executed, batch, result)

    def _plan_ahead(self) -> None:
        """As the engine does on CUDA: once all is launched, while the device computes."""
        self._runner.prepare(self._scheduler.plan_ahead())

    def begin_decode(self, num_seqs: int) -> None:
        """Compute prompts until every sequence decodes."""
        while True:
            batch = self.step().batch
            if len(batch.sequences) == batch.num_tokens == num_seqs and not batch.images:
                return


def decode(runner: ModelRunner, row: Row, size: Size, bytes_per_s: float) -> dict[str, Any]:
    """Steps in which every sequence gets one token, each behind a longer context than the last."""
    loop = _decoding(runner, row, size)
    before = runner.num_replays
    steps = [loop.step() for _ in range(size.steps + 1)]
    loop.clock.wait()
    ms = loop.clock.ms
    periods = [ms(a.begin, b.begin) for a, b in pairwise(steps)]
    computing = [ms(one.executes, one.executed) for one in steps[:-1]]
    step_ms = statistics.median(periods)
    sequences = steps[len(steps) // 2].batch.sequences
    middle = round(statistics.fmean(one.start + 1 for one in sequences))
    num_keys = _keys_of_image(runner) if row.has_image else 0
    layer_size = 1 if row.quantize == INT8 else None
    work = decode_work(
        runner.config.text_config, row.batch, middle, num_keys, _itemsize(runner), layer_size
    )
    bound_ms = 1e3 * work.num_bytes / bytes_per_s
    return {
        "context": middle,
        "steps": size.steps,
        "replayed": runner.num_replays - before,
        "step_ms": round(step_ms, 4),
        "step_ms_p10": round(_quantile(periods, 0.1), 4),
        "step_ms_p90": round(_quantile(periods, 0.9), 4),
        "step_ms_mean": round(statistics.fmean(periods), 4),
        "execute_ms": round(statistics.median(computing), 4),
        "tokens_per_s": round(1e3 * row.batch / step_ms, 2),
        "gigabytes": round(work.num_bytes / 1e9, 4),
        "bound_ms": round(bound_ms, 4),
        "share_of_bound": round(bound_ms / step_ms, 4),
    }


def _decoding(runner: ModelRunner, row: Row, size: Size) -> Loop:
    """The row's sequences, all decoding, and all kernels of such steps compiled."""
    loop = Loop(runner, size, row.batch)
    for _ in range(row.batch):
        loop.add(size.context, size.length(row.batch) - size.context, row.has_image)
    loop.begin_decode(row.batch)
    for _ in range(size.warm_steps):
        loop.step()
    loop.clock.wait()
    return loop


def prefill(runner: ModelRunner, row: Row, size: Size, bytes_per_s: float) -> dict[str, Any]:
    """A prompt of text, computed in one step, again and again."""
    loop = Loop(runner, size, 1)
    steps = _alone(loop, size, size.prefill_tokens, has_image=False)
    step_ms = statistics.median(loop.clock.ms(one.begin, one.executed) for one in steps)
    work = prompt_work(runner.config.text_config, 1, size.prefill_tokens, 0, 1)
    return {
        "tokens": size.prefill_tokens,
        "repeats": size.repeats,
        "step_ms": round(step_ms, 4),
        "tokens_per_s": round(1e3 * size.prefill_tokens / step_ms, 1),
        "tflop_per_s": round(work.flops / step_ms / 1e9, 2),
    }


def encode(runner: ModelRunner, row: Row, size: Size, bytes_per_s: float) -> dict[str, Any]:
    """A prompt with one image of all tiles: the vision encoder alone, and the whole step."""
    loop = Loop(runner, size, 1)
    steps = _alone(loop, size, IMAGE_TOKENS, has_image=True)
    step_ms = statistics.median(loop.clock.ms(one.begin, one.executed) for one in steps)
    seconds = statistics.median(one.result.vision_seconds for one in steps)
    tiles = runner.info.max_num_tiles
    flops = prefill_work(runner.config, 1, IMAGE_TOKENS, tiles, 1).flops
    return {
        "tiles": tiles,
        "repeats": size.repeats,
        "encode_ms": round(1e3 * seconds, 3),
        "step_ms": round(step_ms, 4),
        "tflop_per_s": round(flops / step_ms / 1e9, 2),
    }


def _alone(loop: Loop, size: Size, num_tokens: int, has_image: bool) -> list[Step]:
    """Steps that each compute a whole request of one token, those to warm up left out."""
    steps = []
    for _ in range(2 + size.repeats):
        loop.add(num_tokens, 1, has_image)
        step = loop.step()
        assert step.batch.num_tokens == num_tokens, "a prompt took more than one step"
        steps.append(step)
    loop.clock.wait()
    return steps[2:]


def profile(runner: ModelRunner, row: Row, size: Size, bytes_per_s: float) -> dict[str, Any]:
    """Where a decode step's time goes: operators by their own time, launches and waits."""
    loop = _decoding(runner, row, size)
    with torch.profiler.profile() as found:
        for _ in range(PROFILED_STEPS):
            loop.step()
        loop.clock.wait()
    events: list[Any] = list(found.key_averages())
    is_cuda = size.device == "cuda"
    own = "self_device_time_total" if is_cuda else "self_cpu_time_total"

    def count(names: Iterable[str]) -> float:
        calls = sum(one.count for one in events if one.key in names)
        return round(calls / PROFILED_STEPS, 1)

    # with a device, operators on the host repeat the time of the kernels that they launch
    listed = [one for one in events if not is_cuda or one.device_type.name == "CUDA"]
    listed.sort(key=lambda one: getattr(one, own), reverse=True)
    return {
        "steps": PROFILED_STEPS,
        "launches_a_step": count(LAUNCHES),
        "waits_a_step": count(WAITS),
        "copies_a_step": count(["cudaMemcpyAsync"]),
        "device_ms": round(sum(getattr(one, own) for one in listed) / PROFILED_STEPS / 1e3, 4),
        "top": [
            {
                "name": one.key[:100],
                "us": round(getattr(one, own) / PROFILED_STEPS, 1),
                "calls": round(one.count / PROFILED_STEPS, 1),
            }
            for one in listed[:PROFILED_NAMES]
        ],
    }


def copy_bandwidth(size: Size) -> dict[str, Any]:
    """Bytes a second of a plain copy on the device, read and written ones both counted."""
    device = torch.device(size.device)
    clock = Clock(device)
    source = torch.ones(size.copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    marks = []
    for _ in range(3 + 20):
        begin = clock.mark()
        target.copy_(source)
        marks.append((begin, clock.mark()))
    clock.wait()
    times = [clock.ms(begin, end) for begin, end in marks[3:]]
    moved = 2.0 * source.nbytes
    return {
        "bytes": moved,
        "copies": len(times),
        "bytes_per_s": round(1e3 * moved / statistics.median(times)),
        "best_bytes_per_s": round(1e3 * moved / min(times)),
    }


def _keys_of_image(runner: ModelRunner) -> int:
    return runner.info.max_num_tiles * runner.pools.num_patches


def _itemsize(runner: ModelRunner) -> int:
    return int(getattr(torch, runner.info.dtype).itemsize)


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


MEASURES: dict[str, Callable[[ModelRunner, Row, Size, float], dict[str, Any]]] = {
    "decode": decode,
    "prefill": prefill,
    "encode": encode,
    "products": products,
    "profile": profile,
}
