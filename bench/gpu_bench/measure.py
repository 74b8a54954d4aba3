"""Measures one row: requests through the scheduler and the runner, as the engine computes them.

Owns the steps of each kind of row. Knows nothing of processes or of the list of rows. A step's time
is from its planning to the planning of the next step: what a client would see.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from vlmserve.models.batch import SamplingParams, StepBatch, StepResult
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.router.scheduler.interface import SchedulerLimits

from ..bounds import Machine, decode_work, prefill_work, prompt_work
from ..engine_requests import GREEDY, Loop
from .clock import Clock
from .plan import CHUNK, INT8, LONG, ONE_TILE, TOP_P, Row, Size
from .products import products

IMAGE_TOKENS = 16
PROFILED_STEPS = 3
PROFILED_NAMES = 12
# a profile's events in which the host waits for the device, and in which it launches work
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
KERNELS = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
LAUNCHES = (*KERNELS, "cudaGraphLaunch")


@dataclass(slots=True)
class Step:
    """A step's marks, what it computed, and its result; it ends where the next step starts.

    launched: the end of the work that is queued before the tokens are fetched, on a GPU. starts:
    where the next step's pass is launched, if that is before the next step.
    """

    start: Any
    executes: Any
    executed: Any
    batch: StepBatch
    result: StepResult
    launched: Any
    starts: Any


class TimedLoop:
    """Requests of random tokens, and timed steps that compute them."""

    def __init__(self, runner: ModelRunner, size: Size, num_seqs: int, load: str = "") -> None:
        self.runner, self.size, self.load = runner, size, load
        self.clock = Clock(size.device)
        self._num_requests = 0
        limits = SchedulerLimits(
            max_num_seqs=num_seqs + (load == CHUNK),
            max_num_batched_tokens=num_seqs + size.chunk
            if load == CHUNK
            else max(size.prefill_tokens, num_seqs),
            max_num_batched_images=4,
            max_model_len=runner.info.max_model_len,
            prefix_cache=False,
            image_cache=False,
        )
        self._loop = Loop(runner, limits, np.random.default_rng(num_seqs))

    def add(self, num_tokens: int, max_tokens: int, has_image: bool) -> None:
        """A waiting request; its image has all tiles that an image may have, or one."""
        num_tiles = 1 if self.load == ONE_TILE else self.runner.info.max_num_tiles
        sampling = SamplingParams(top_p=0.9) if self.load == TOP_P else GREEDY
        name = str(self._num_requests)
        self._loop.add(name, num_tokens, max_tokens, num_tiles * has_image, sampling)
        self._num_requests += 1

    def step(self) -> Step:
        """Plan, compute, update."""
        start = self.clock.mark()
        batch = self._loop.plan()
        executes = self.clock.mark()
        launched: list[Any] = []
        starts: list[Any] = []
        result = self._loop.execute(
            batch,
            lambda: launched.append(self.clock.mark()),
            lambda: starts.append(self.clock.mark()),
        )
        executed = self.clock.mark()
        self._loop.scheduler.update(result)
        end = launched[0] if launched else executed
        return Step(start, executes, executed, batch, result, end, starts[0] if starts else None)

    def start_decode(self, row: Row) -> None:
        """Compute the row's prompts until every sequence decodes and all kernels are compiled."""
        for index in range(row.batch):
            is_long = row.load == LONG and index == 0
            context = self.size.long_tokens if is_long else self.size.context
            num_decoded = self.size.length(row.batch) - self.size.context
            self.add(context, num_decoded + self._num_chunks, row.has_image)
        while True:
            batch = self.step().batch
            if len(batch.sequences) == batch.num_tokens == row.batch and not batch.images:
                break
        if row.load == CHUNK:  # a prompt that outlasts all steps, a chunk of it in each
            self.add((self.size.steps + self.size.warm_steps + 2) * self.size.chunk, 1, False)
        for _ in range(self.size.warm_steps):
            self.step()
        self.clock.wait()

    @property
    def _num_chunks(self) -> int:
        """Steps of the long row's prompt, in which the others decode."""
        return -(-self.size.long_tokens // self.size.prefill_tokens) if self.load == LONG else 0

    def whole_requests(self, num_tokens: int, has_image: bool) -> list[Step]:
        """Steps that each compute a whole request of one token, without the warm-up steps."""
        steps = []
        for _ in range(2 + self.size.repeats):
            self.add(num_tokens, 1, has_image)
            steps.append(self.step())
            assert steps[-1].batch.num_tokens == num_tokens, "a prompt took more than one step"
        self.clock.wait()
        return steps[2:]


def decode(runner: ModelRunner, row: Row, size: Size, machine: Machine) -> dict[str, Any]:
    """Steps in which every sequence gets one token, each after a longer context than the last."""
    loop = TimedLoop(runner, size, row.batch, row.load)
    loop.start_decode(row)
    before = runner.num_replays
    steps = [loop.step() for _ in range(size.steps + 1)]
    loop.clock.wait()
    periods = sorted(loop.clock.ms(a.start, b.start) for a, b in pairwise(steps))
    step_ms = statistics.median(periods)
    batch = steps[len(steps) // 2].batch
    # a chunk reads its past once, as a row does
    middle = round(statistics.fmean(s.start + 1 for s in batch.sequences))
    num_keys = runner.info.max_num_tiles * runner.pools.num_patches if row.has_image else 0
    itemsize = getattr(torch, runner.info.dtype).itemsize
    sizes = num_keys, itemsize, 1 if row.quantize == INT8 else None
    num_rows = len(batch.sequences)
    num_bytes = decode_work(runner.config.text_config, num_rows, middle, *sizes).num_bytes
    bound_ms = 1e3 * num_bytes / machine.bytes_per_s
    idle = [(a.launched, a.starts or b.executes) for a, b in pairwise(steps)]
    return {
        "context": middle,
        "tokens": batch.num_tokens,
        "steps": size.steps,
        "replayed": runner.num_replays - before,
        "step_ms": round(step_ms, 4),
        "step_ms_p10": round(periods[int(0.1 * len(periods))], 4),
        "step_ms_p90": round(periods[int(0.9 * len(periods))], 4),
        "step_ms_mean": round(statistics.fmean(periods), 4),
        "execute_ms": round(
            loop.clock.median_ms([(s.executes, s.executed) for s in steps[:-1]]), 4
        ),
        "idle_ms": round(loop.clock.median_ms(idle), 4) if size.device == "cuda" else None,
        "tokens_per_s": round(1e3 * row.batch / step_ms, 2),
        "gigabytes": round(num_bytes / 1e9, 4),
        "bound_ms": round(bound_ms, 4),
        "share_of_bound": round(bound_ms / step_ms, 4),
    }


def prefill(runner: ModelRunner, row: Row, size: Size, machine: Machine) -> dict[str, Any]:
    """A prompt of text, computed in one step, again and again."""
    loop = TimedLoop(runner, size, 1)
    steps = loop.whole_requests(size.prefill_tokens, has_image=False)
    step_ms = loop.clock.median_ms([(step.start, step.executed) for step in steps])
    itemsize = getattr(torch, runner.info.dtype).itemsize
    work = prompt_work(runner.config.text_config, 1, size.prefill_tokens, 0, itemsize)
    return {
        "bound_ms": round(1e3 * machine.bound_s(work), 4),
        "tokens": size.prefill_tokens,
        "repeats": size.repeats,
        "step_ms": round(step_ms, 4),
        "tokens_per_s": round(1e3 * size.prefill_tokens / step_ms, 1),
        "tflop_per_s": round(work.flops / step_ms / 1e9, 2),
    }


def encode(runner: ModelRunner, row: Row, size: Size, machine: Machine) -> dict[str, Any]:
    """A prompt with one image: the vision encoder alone, and the whole step."""
    loop = TimedLoop(runner, size, 1, row.load)
    steps = loop.whole_requests(IMAGE_TOKENS, has_image=True)
    step_ms = loop.clock.median_ms([(step.start, step.executed) for step in steps])
    seconds = statistics.median(step.result.vision_seconds for step in steps)
    tiles = 1 if row.load == ONE_TILE else runner.info.max_num_tiles
    itemsize = getattr(torch, runner.info.dtype).itemsize
    work = prefill_work(runner.config, 1, IMAGE_TOKENS, tiles, itemsize)
    return {
        "tiles": tiles,
        "bound_ms": round(1e3 * machine.bound_s(work), 4),
        "repeats": size.repeats,
        "encode_ms": round(1e3 * seconds, 3),
        "step_ms": round(step_ms, 4),
        "tflop_per_s": round(work.flops / step_ms / 1e9, 2),
    }


def profile(runner: ModelRunner, row: Row, size: Size, machine: Machine) -> dict[str, Any]:
    """Where a decode step's time goes: operators by their own time, launches and waits."""
    loop = TimedLoop(runner, size, row.batch)
    loop.start_decode(row)
    with torch.profiler.profile() as found:
        for _ in range(PROFILED_STEPS):
            loop.step()
        loop.clock.wait()
    events: list[Any] = list(found.key_averages())
    is_cuda = size.device == "cuda"

    def count(names: Iterable[str]) -> float:
        calls = sum(event.count for event in events if event.key in names)
        return round(calls / PROFILED_STEPS, 1)

    def us(event: Any) -> float:
        own = event.self_device_time_total if is_cuda else event.self_cpu_time_total
        return float(own) / PROFILED_STEPS

    # on a device, the operators of the host repeat the time of the kernels that they launch
    listed = [event for event in events if not is_cuda or event.device_type.name == "CUDA"]
    top = sorted(listed, key=us, reverse=True)[:PROFILED_NAMES]
    return {
        "steps": PROFILED_STEPS,
        "launches_a_step": count(LAUNCHES),
        "waits_a_step": count(WAITS),
        "copies_a_step": count(["cudaMemcpyAsync"]),
        "device_ms": round(sum(map(us, listed)) / 1e3, 4),
        "top": [
            {
                "name": e.key[:100],
                "us": round(us(e), 1),
                "calls": round(e.count / PROFILED_STEPS, 1),
            }
            for e in top
        ],
    }


def copy_bandwidth(size: Size) -> dict[str, Any]:
    """Bytes a second of a plain copy on the device; read and written bytes both count.

    Also operations a second of a large product in the run's dtype.
    """
    clock = Clock(size.device)
    source = torch.ones(size.copy_bytes // 4, device=size.device)
    target = torch.empty_like(source)
    marks = []
    for _ in range(3 + 20):
        start = clock.mark()
        target.copy_(source)
        marks.append((start, clock.mark()))
    side = 8192 if size.device == "cuda" else 128
    square = torch.ones(side, side, device=size.device, dtype=getattr(torch, size.dtype))
    products = []
    for _ in range(3 + 10):
        start = clock.mark()
        square @ square
        products.append((start, clock.mark()))
    clock.wait()
    moved = 2.0 * source.nbytes
    return {
        "flops_per_s": round(2e3 * side**3 / clock.median_ms(products[3:])),
        "bytes": moved,
        "copies": len(marks[3:]),
        "bytes_per_s": round(1e3 * moved / clock.median_ms(marks[3:])),
        "best_bytes_per_s": round(1e3 * moved / min(clock.ms(*pair) for pair in marks[3:])),
    }


MEASURES: dict[str, Callable[[ModelRunner, Row, Size, Machine], dict[str, Any]]] = {
    "decode": decode,
    "prefill": prefill,
    "encode": encode,
    "products": products,
    "profile": profile,
}
