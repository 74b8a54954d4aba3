"""Measures what the engine adds to the model's forward: planning, metadata, sampling, messages.

    python bench/checkpoints.py m100 --out m100
    OMP_NUM_THREADS=1 python bench/overhead.py --checkpoint m100 --dtype bfloat16

The true engine in this process, `--sequences` requests decoding at once, half with an image. Each
part's own time is taken by wrapping its functions, without what they call of other parts; what is
left of a step is the loop's and the hand-over to its thread. The last line printed is one JSON
document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import numpy as np

from processes import machine
from vlmserve.models import bundled
from vlmserve.models.batch import ImageSpan, ImageTiles, SamplingParams
from vlmserve.models.create_runner import create_runner
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.settings.runner_config import RunnerConfig
from vlmserve.router import wire
from vlmserve.router.config import EngineConfig
from vlmserve.router.engine.engine import Engine
from vlmserve.router.messages import AddRequest, FromEngine, StepOutputs

MODEL, SCHEDULE, METADATA = "model's forward", "schedule", "metadata"
SAMPLING, MESSAGES, LOOP = "sampling", "messages", "loop and thread"
NUM_PROMPT_TOKENS = 32
NUM_WARM_STEPS = 10


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--checkpoint", default="", help="folder; default: the bundled model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100, help="decode steps that are measured")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--plan-ahead", action="store_true", help="as the setting of that name")
    return parser.parse_args()


@dataclass
class Clock:
    """Seconds of each part, its own alone: a part that calls another is stopped meanwhile."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _parts: list[str] = field(default_factory=list)
    _since: float = 0.0

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Count the calls of a method as `part`, on this object."""
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


def make_runner(args: argparse.Namespace) -> ModelRunner:
    return create_runner(
        args.checkpoint or str(bundled.CHECKPOINT),
        RunnerConfig(
            device="cpu",
            dtype=args.dtype,
            max_model_len=NUM_PROMPT_TOKENS + args.steps + 64,
            max_num_seqs=args.sequences,
        ),
    )


def request(runner: ModelRunner, number: int, args: argparse.Namespace) -> AddRequest:
    """A prompt of random tokens, every second one with an image of one tile."""
    info, rng = runner.info, np.random.default_rng(number)
    images = []
    if number % 2:
        shape = (1, 3, info.tile_size, info.tile_size)
        data = rng.integers(0, 256, shape, dtype=np.uint8).tobytes()
        digest = number.to_bytes(8, "big")
        images = [
            ImageTiles(
                data=data,
                num_tiles=1,
                tile_size=info.tile_size,
                aspect_ratio_id=1,
                content_hash=digest,
            )
        ]
    token_ids = rng.integers(1, info.vocab_size // 2, NUM_PROMPT_TOKENS).tolist()
    if images:
        token_ids[0] = info.vocab_size
    return AddRequest(
        request_id=f"r{number}",
        prompt_token_ids=token_ids,
        images=images,
        spans=[ImageSpan(0)] * len(images),
        sampling=SamplingParams(temperature=args.temperature, seed=number),
        max_tokens=args.steps + 60,
    )


class Measurement:
    """One engine whose parts are timed while all requests decode."""

    def __init__(self, runner: ModelRunner, args: argparse.Namespace) -> None:
        self._args = args
        config = EngineConfig(
            model="bench",
            socket_path="",
            max_num_seqs=args.sequences,
            plan_ahead=args.plan_ahead,
        )
        self._clock = Clock()
        self._engine = Engine(runner, config, self.send)
        self._num_steps = 0
        self._is_over = asyncio.Event()
        self._began = self.seconds = 0.0
        for owner, names, part in [
            (runner, ("_forward", "_logits"), MODEL),
            (runner, ("_pack", "_step", "_row_mask"), METADATA),
            (runner, ("_sample",), SAMPLING),
            (self._engine.scheduler, ("schedule", "update"), SCHEDULE),
            (self._engine, ("_deliver",), MESSAGES),
        ]:
            for name in names:
                self._clock.wrap(owner, name, part)

    def send(self, worker_id: int, message: FromEngine) -> None:
        """Where the engine hands its messages to: encoded, as for a socket."""
        wire.encode_frame(message)
        if isinstance(message, StepOutputs) and len(message.outputs) == self._args.sequences:
            self._count_step()

    def _count_step(self) -> None:
        self._num_steps += 1
        if self._num_steps == NUM_WARM_STEPS:
            self._clock.seconds.clear()
            self._began = time.perf_counter()
        elif self._num_steps == NUM_WARM_STEPS + self._args.steps:
            self.seconds = time.perf_counter() - self._began
            self.shares = dict(self._clock.seconds)
            self._is_over.set()

    async def run(self, requests: list[AddRequest]) -> None:
        """Decode until enough steps are measured."""
        for one in requests:
            self._engine.add(1, one)
        running = asyncio.create_task(self._engine.run())
        await asyncio.wait(
            {running, asyncio.create_task(self._is_over.wait())}, return_when="FIRST_COMPLETED"
        )
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
    args = parse_arguments()
    runner = make_runner(args)
    measurement = Measurement(runner, args)
    requests = [request(runner, number, args) for number in range(args.sequences)]
    asyncio.run(measurement.run(requests))
    figures = report(measurement, args.steps)
    document = {
        "machine": machine(),
        "checkpoint": args.checkpoint or "bundled",
        "dtype": runner.info.dtype,
        "sequences": args.sequences,
        "steps": args.steps,
        "temperature": args.temperature,
        "plan_ahead": args.plan_ahead,
    }
    print(json.dumps(document | figures))


if __name__ == "__main__":
    main()
