"""Measures what the engine adds to the model's forward: planning, metadata, sampling, messages.

    python bench/checkpoints.py m100 --out m100
    OMP_NUM_THREADS=1 python bench/overhead.py --checkpoint m100 --dtype bfloat16

Runs the real engine in this process: `--sequences` requests decode at once, half with an image.
Wrappers around each part's functions measure its own time, without calls of other parts. The rest
of a step is the loop and the hand-over to its thread. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import numpy as np

from engine_requests import open_runner, random_request
from processes import BUNDLED, arguments, print_document
from vlmserve.models.batch import SamplingParams
from vlmserve.models.execution import runner as runner_module
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.router.config import EngineConfig
from vlmserve.router.engine.engine import Engine
from vlmserve.router.messages import AddRequest, FromEngine, StepOutputs
from vlmserve.router.processes import wire

MODEL, LOOP = "model's forward", "loop and thread"
NUM_PROMPT_TOKENS = 32
NUM_WARM_STEPS = 10


@dataclass
class Clock:
    """Seconds of each part alone: the clock of a part stops while it calls another part."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _parts: list[str] = field(default_factory=list)
    _since: float = 0.0

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Count the calls of this object's method as `part`."""
        method: Callable[..., Any] = getattr(owner, name)

        @wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._parts.append(part)
            try:
                return method(*args, **kwargs)
            finally:
                self._switch()
                self._parts.pop()

        setattr(owner, name, timed)

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._parts:
            self.seconds[self._parts[-1]] += now - self._since
        self._since = now


def requests_of(runner: ModelRunner, args: argparse.Namespace) -> list[AddRequest]:
    """Prompts of random tokens, every second prompt with an image of one tile."""
    requests = []
    for number in range(args.sequences):
        rng = np.random.default_rng(number)
        sampling = SamplingParams(temperature=args.temperature, seed=number)
        sizes = NUM_PROMPT_TOKENS, args.steps + 60, number % 2
        requests.append(random_request(rng, runner, f"r{number}", *sizes, sampling))
    return requests


class Measurement:
    """Times an engine's parts while all requests decode."""

    def __init__(self, runner: ModelRunner, args: argparse.Namespace) -> None:
        self._args = args
        num_seqs, plan_ahead = args.sequences, args.plan_ahead
        config = EngineConfig(
            model="bench", socket_path="", max_num_seqs=num_seqs, plan_ahead=plan_ahead
        )
        self._clock = Clock()
        self._engine = Engine(runner, config, self.send)
        self._num_steps = 0
        self._is_over = asyncio.Event()
        self._started = self.seconds = 0.0
        self.shares: dict[str, float] = {}
        for owner, names, part in [
            (runner, ("_forward", "_logits"), MODEL),
            (runner, ("_pack",), "metadata"),
            (runner_module, ("send",), "metadata"),
            (runner, ("_sample",), "sampling"),
            (self._engine.scheduler, ("schedule", "update"), "schedule"),
            (self._engine, ("_deliver",), "messages"),
        ]:
            for name in names:
                self._clock.wrap(owner, name, part)

    def send(self, worker_id: int, message: FromEngine) -> None:
        """Take the engine's messages: encode them, as for a socket, and count full steps."""
        wire.encode_frame(message)
        if not isinstance(message, StepOutputs) or len(message.outputs) != self._args.sequences:
            return
        self._num_steps += 1
        if self._num_steps == NUM_WARM_STEPS:
            self._clock.seconds.clear()
            self._started = time.perf_counter()
        elif self._num_steps == NUM_WARM_STEPS + self._args.steps:
            self.seconds = time.perf_counter() - self._started
            self.shares = dict(self._clock.seconds)
            self._is_over.set()

    async def run(self, requests: list[AddRequest]) -> None:
        """Decode until enough steps are measured."""
        for one in requests:
            self._engine.add(1, one)
        running = asyncio.create_task(self._engine.run())
        over = asyncio.create_task(self._is_over.wait())
        await asyncio.wait({running, over}, return_when="FIRST_COMPLETED")
        if running.done():
            running.result()
        running.cancel()


def report(measurement: Measurement, num_steps: int) -> dict[str, object]:
    """Each part's milliseconds a step and its share; the overhead is all but the model's."""
    total = measurement.seconds
    parts = dict(measurement.shares)
    parts[LOOP] = total - sum(parts.values())
    print(f"{'part':<18} {'ms a step':>10} {'share':>7}")
    for part, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"{part:<18} {seconds / num_steps * 1e3:>10.3f} {seconds / total:>7.1%}")
    overhead = 1 - parts[MODEL] / total
    print(f"overhead: {overhead:.1%} of {total / num_steps * 1e3:.1f} ms")
    return {
        "step_ms": round(total / num_steps * 1e3, 3),
        "overhead_share": round(overhead, 4),
        "parts_ms": {part: round(s / num_steps * 1e3, 4) for part, s in parts.items()},
    }


def main() -> None:
    args = arguments(
        __doc__,
        checkpoint=BUNDLED,
        dtype="auto",
        sequences=32,
        steps=(100, "decode steps that are measured"),
        temperature=0.0,
        plan_ahead=(False, "as the setting of that name"),
    )
    runner = open_runner(
        args.checkpoint,
        device="cpu",
        dtype=args.dtype,
        max_model_len=NUM_PROMPT_TOKENS + args.steps + 64,
        max_num_seqs=args.sequences,
    )
    measurement = Measurement(runner, args)
    asyncio.run(measurement.run(requests_of(runner, args)))
    print_document(args, dtype=runner.info.dtype, **report(measurement, args.steps))


if __name__ == "__main__":
    main()
