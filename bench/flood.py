"""Measures what shares cost: the same requests of two API keys, and of one key.

    python bench/checkpoints.py m100 --out m100
    python bench/flood.py --checkpoint m100 --dtype bfloat16 --floods 64 --max-tokens 20

The real engine and runner, with one thread for the model, without a server. One key floods the
engine; meanwhile a small request of another key arrives every few steps. Then the same with one key
for all. The clock is this process's CPU time, so that other work on the machine changes it little.
`cost` is the CPU time of all requests with shares, divided by that with one key; `times` is a small
request's median first token beside the flood, divided by that alone. The last line is one JSON
document.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np

from engine_requests import open_runner, random_request
from processes import BUNDLED, arguments, print_document
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.router.config import EngineConfig
from vlmserve.router.engine.engine import Engine
from vlmserve.router.errors import EngineDeadError
from vlmserve.router.messages import AddRequest, FromEngine, RequestFailed, StepOutputs

FLOODER, OTHER = "flooder", "other"


@dataclass
class Round:
    """One engine, its requests, and the CPU seconds at which their first tokens came."""

    runner: ModelRunner
    max_num_seqs: int
    seed: int
    first: dict[str, float] = field(default_factory=dict)
    arrived: dict[str, float] = field(default_factory=dict)
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    num_open: int = 0
    num_inside: int = 0

    def __post_init__(self) -> None:
        config = EngineConfig(
            model="",
            socket_path="",
            max_num_seqs=self.max_num_seqs,
            prefix_cache=False,
            max_queue_requests=100_000,  # a flood waits as a whole
            max_queue_wait_s=100_000.0,
        )
        self.engine = Engine(self.runner, config, self._receive)
        self._rng = np.random.default_rng(self.seed)
        insert = self.engine.scheduler.insert

        def counted() -> object:
            batch = insert()
            self.num_inside += batch is not None
            return batch

        self.engine.scheduler.insert = counted  # type: ignore[method-assign,assignment]

    def _receive(self, worker_id: int, message: FromEngine) -> None:
        assert not isinstance(message, RequestFailed), message
        if isinstance(message, StepOutputs):
            for output in message.outputs:
                self.first.setdefault(output.request_id, time.process_time())
                self.num_open -= output.finish_reason is not None
            self.answered.set()

    def add(self, name: str, owner: str, num_tokens: int, max_tokens: int) -> None:
        """Send a request of random tokens."""
        request: AddRequest = random_request(self._rng, self.runner, name, num_tokens, max_tokens)
        request.owner = owner
        self.num_open += 1
        self.arrived[name] = time.process_time()
        self.engine.add(0, request)

    @property
    def num_steps(self) -> int:
        return self.engine.snapshot().num_steps

    async def until(self, num_open: int, num_steps: float = math.inf) -> None:
        """Return when at most num_open requests are open, or so many steps were computed."""
        while self.num_open > num_open and self.num_steps < num_steps:
            self.answered.clear()
            await self.answered.wait()

    def waits(self) -> list[float]:
        """CPU seconds from each small request to its first token."""
        return [self.first[one] - at for one, at in self.arrived.items() if one.startswith("small")]


@dataclass(frozen=True)
class Load:
    """What a round sends. every: steps between two small requests."""

    floods: int
    max_tokens: int
    prompt: int
    small: int
    every: int


async def beside(one: Round, load: Load, owner: str) -> float:
    """The CPU seconds of the flood and the small requests of `owner`."""
    started = time.process_time()
    for number in range(load.floods):
        one.add(f"flood {number}", FLOODER, load.prompt, load.max_tokens)
    for number in range(load.small):
        await one.until(1, one.num_steps + load.every)
        one.add(f"small {number}", owner, load.prompt, 1)
    await one.until(0)
    return time.process_time() - started


async def alone(one: Round, load: Load, owner: str) -> float:
    """The same of the small requests, one after the other."""
    started = time.process_time()
    for number in range(load.small):
        one.add(f"small {number}", owner, load.prompt, 1)
        await one.until(0)
    return time.process_time() - started


Send = Callable[[Round, Load, str], Awaitable[float]]


async def measure(one: Round, load: Load, send: Send, owner: str) -> float:
    """Run an engine for one round. Returns its CPU seconds."""
    running = asyncio.create_task(one.engine.run())
    try:
        return await send(one, load, owner)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        one.engine.close(EngineDeadError("the round has ended"))


def main() -> None:
    args = arguments(
        __doc__, checkpoint=BUNDLED, dtype="float32", rounds=3, max_num_seqs=64, floods=128,
        max_tokens=60, prompt=30, small=16, every=4,
    )  # fmt: skip
    load = Load(args.floods, args.max_tokens, args.prompt, args.small, args.every)
    runner = open_runner(args.checkpoint, dtype=args.dtype, device="cpu", num_threads=1)
    seconds: dict[str, list[float]] = {"alone": [], "two keys": [], "one key": []}
    waits: dict[str, list[float]] = {name: [] for name in seconds}
    counts = {}
    for seed in range(args.rounds):
        for name, send, owner in (
            ("alone", alone, OTHER),
            ("two keys", beside, OTHER),
            ("one key", beside, FLOODER),
        ):
            one = Round(runner, args.max_num_seqs, seed)
            seconds[name].append(asyncio.run(measure(one, load, send, owner)))
            waits[name] += one.waits()
            counts[name] = {"steps": one.num_steps, "inside": one.num_inside}
            print(name, f"{seconds[name][-1]:.2f} s", counts[name], flush=True)
    medians = {name: statistics.median(values) for name, values in waits.items()}
    pairs = zip(seconds["two keys"], seconds["one key"], strict=True)
    print_document(
        args,
        cost=round(statistics.median(two / single for two, single in pairs), 3),
        times=round(medians["two keys"] / medians["alone"], 2),
        longest=round(max(waits["two keys"]) / medians["alone"], 2),
        cpu_seconds={name: [round(one, 2) for one in values] for name, values in seconds.items()},
        wait_s={name: round(value, 4) for name, value in medians.items()},
        counts=counts,
    )


if __name__ == "__main__":
    main()
