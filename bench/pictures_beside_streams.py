"""Measures how much arriving requests with pictures delay running text streams.

    python bench/checkpoints.py vision-heavy --out vision-heavy
    OMP_NUM_THREADS=1 python bench/pictures_beside_streams.py --checkpoint vision-heavy --rate 2

The real scheduler and runner, without a server. `--streams` texts decode all the time; meanwhile
requests with a new picture each arrive at random times (Poisson), `--rate` a second. The clock is
the engine's CPU time, so other work on the machine does not count; `--clock wall` takes the wall
clock. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from engine_requests import Loop, open_runner
from processes import BUNDLED, arguments, print_document
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.router.scheduler.interface import SchedulerLimits

MAX_MODEL_LEN = 2048
MAX_NUM_SEQS = 64
NUM_PROMPT_TOKENS = 32
CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}


@dataclass
class Measurement:
    """An engine's steps on their own clock, and when each request's tokens came."""

    runner: ModelRunner
    args: argparse.Namespace
    now: float = 0.0
    arrivals: dict[str, float] = field(default_factory=dict)
    token_times: dict[str, list[float]] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._clock = CLOCKS[self.args.clock]
        self._rng = np.random.default_rng(self.args.seed)
        tokens, images = self.args.max_num_batched_tokens, self.args.max_num_batched_images
        limits = SchedulerLimits(MAX_NUM_SEQS, tokens, images, MAX_MODEL_LEN)
        self._loop = Loop(self.runner, limits, self._rng)

    def run(self) -> None:
        """Everything, from the first stream's prompt to the last picture's answer."""
        args, num_tiles = self.args, self.runner.info.max_num_tiles
        for number in range(args.streams):
            longest = MAX_MODEL_LEN - NUM_PROMPT_TOKENS - 1
            self._loop.add(f"stream {number}", NUM_PROMPT_TOKENS, longest)
        while self._step() > args.streams:  # until all decode
            pass
        self.now, self.step_seconds = 0.0, []
        due = list(np.cumsum(self._rng.exponential(1 / args.rate, args.pictures)))
        open_pictures: set[str] = set()
        while due or open_pictures:
            while due and due[0] <= self.now:
                self.arrivals[name := f"picture {len(self.arrivals)}"] = due.pop(0)
                open_pictures.add(name)
                self._loop.add(name, NUM_PROMPT_TOKENS, args.output_tokens, num_tiles)
            self._step(open_pictures)

    def chunk_seconds(self) -> float:
        """Seconds of a step that one long prompt fills, beside the streams."""
        self._loop.add("long", MAX_MODEL_LEN - 2, 1)
        num_tokens = self._step()
        assert num_tokens >= min(self.args.max_num_batched_tokens, MAX_MODEL_LEN - 2)
        return self.step_seconds[-1]

    def _step(self, open_pictures: set[str] | None = None) -> int:
        """Compute one step; returns its number of tokens."""
        started = self._clock()
        batch = self._loop.plan()
        progress = self._loop.scheduler.update(self.runner.execute(batch))
        spent = self._clock() - started
        self.now += spent
        self.step_seconds.append(spent)
        for one in progress:
            name = one.sequence.request_id
            self.token_times.setdefault(name, []).append(self.now)
            if one.finish_reason is not None and open_pictures is not None:
                open_pictures.discard(name)
        return batch.num_tokens


def report(measurement: Measurement) -> dict[str, object]:
    times = measurement.token_times
    streams = [moments for name, moments in times.items() if name.startswith("stream")]
    gaps = [later - earlier for moments in streams for earlier, later in pairwise(moments[1:])]
    firsts = [times[name][0] - due for name, due in measurement.arrivals.items()]
    num_tokens = sum(moment <= measurement.now for all_of in times.values() for moment in all_of)
    figures: dict[str, object] = {
        "inter_token_ms": _percentiles(gaps),
        "picture_ttft_ms": _percentiles(firsts),
        "tokens_per_s": round(num_tokens / measurement.now, 1),
        "seconds": round(measurement.now, 2),
    }
    for name, value in figures.items():
        print(f"{name:<16} {value}")
    return figures


def _percentiles(seconds: list[float]) -> dict[str, float]:
    values = np.percentile(np.array(seconds) * 1e3, [50, 90, 99, 100])
    names = ("p50", "p90", "p99", "max")
    return {name: round(float(value), 1) for name, value in zip(names, values, strict=True)}


def main() -> None:
    args = arguments(
        __doc__,
        checkpoint=BUNDLED,
        dtype="bfloat16",
        streams=(8, "texts that always decode"),
        pictures=(40, "requests with a picture"),
        rate=(4.0, "requests with a picture a second"),
        output_tokens=(16, "of a picture request"),
        max_num_batched_tokens=2048,
        max_num_batched_images=4,
        clock=list(CLOCKS),
        seed=0,
    )
    runner = open_runner(
        args.checkpoint,
        dtype=args.dtype,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_num_batched_images=args.max_num_batched_images,
        kv_cache_bytes=1 << 30,
    )
    measurement = Measurement(runner, args)
    measurement.run()
    figures = report(measurement)
    chunk_ms = round(measurement.chunk_seconds() * 1e3, 1)
    print_document(args, device=runner.info.device, **figures, chunk_ms=chunk_ms)


if __name__ == "__main__":
    main()
