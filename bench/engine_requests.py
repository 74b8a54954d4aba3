"""Requests of random tokens and images for an engine's queue, and the loop that computes them.

Owns requests and steps without a server. Knows nothing of clocks or of what a step must cost.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlmserve.models import bundled
from vlmserve.models.batch import (
    ImageSpan,
    ImageTiles,
    OnLaunch,
    SamplingParams,
    StepBatch,
    StepResult,
    ignore,
)
from vlmserve.models.create_runner import create_runner
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.settings.runner_config import RunnerConfig
from vlmserve.router.messages import AddRequest
from vlmserve.router.scheduler.interface import SchedulerLimits
from vlmserve.router.scheduler.request_queue import QueueLimits, RequestQueue
from vlmserve.router.scheduler.scheduler import Scheduler
from vlmserve.router.scheduler.sequence import Sequence

GREEDY = SamplingParams(temperature=0.0)
UNBOUNDED = QueueLimits(max_requests=10**6, max_tokens=10**9, max_bytes=10**12)
# 1 x 1, 1 x 2 and 2 x 2 tiles, where an image has at most four
ASPECT_RATIO_IDS = {1: 1, 2: 2, 4: 6}


def open_runner(checkpoint: str, **settings: Any) -> ModelRunner:
    """A checkpoint's runner; an empty name is the bundled model."""
    return create_runner(checkpoint or str(bundled.CHECKPOINT), RunnerConfig(**settings))


def random_image(rng: np.random.Generator, info: Any, num_tiles: int) -> ImageTiles:
    """A new image of random pixels. info: the runner's."""
    shape = (num_tiles, 3, info.tile_size, info.tile_size)
    return ImageTiles(
        data=rng.integers(0, 256, shape, dtype=np.uint8).tobytes(),
        num_tiles=num_tiles,
        tile_size=info.tile_size,
        aspect_ratio_id=ASPECT_RATIO_IDS[num_tiles],
        content_hash=rng.bytes(32),
    )


def random_request(
    rng: np.random.Generator,
    runner: ModelRunner,
    name: str,
    num_tokens: int,
    max_tokens: int,
    num_tiles: int = 0,
    sampling: SamplingParams = GREEDY,
) -> AddRequest:
    """A prompt of random tokens, the first of which is an image of num_tiles, if above 0."""
    token_ids = rng.integers(1, runner.info.vocab_size // 2, num_tokens).tolist()
    images = [random_image(rng, runner.info, num_tiles)] if num_tiles else []
    if images:
        token_ids[0] = runner.config.image_token_index
    return AddRequest(
        request_id=name,
        prompt_token_ids=token_ids,
        images=images,
        spans=[ImageSpan(0)] * len(images),
        sampling=sampling,
        max_tokens=max_tokens,
    )


@dataclass
class Loop:
    """The scheduler and the runner, without an engine or a server."""

    runner: ModelRunner
    limits: SchedulerLimits
    rng: np.random.Generator
    scheduler: Scheduler = field(init=False)

    def __post_init__(self) -> None:
        self._queue = RequestQueue(UNBOUNDED)
        self.scheduler = Scheduler(self.runner.info, self.limits, self._queue)

    def add(
        self,
        name: str,
        num_tokens: int,
        max_tokens: int,
        num_tiles: int = 0,
        sampling: SamplingParams = GREEDY,
    ) -> None:
        """Put a random request into the queue; see `random_request`."""
        args = (self.rng, self.runner, name, num_tokens, max_tokens, num_tiles, sampling)
        self.put(random_request(*args))

    def put(self, request: AddRequest) -> None:
        """Put a request into the queue."""
        for sequence in Sequence.of(0, request):
            self._queue.put(sequence)

    def plan(self) -> StepBatch:
        """Schedule the next step."""
        batch = self.scheduler.schedule()
        assert batch is not None, "the requests ended before they were measured: ask for fewer"
        return batch

    def execute(
        self, batch: StepBatch, on_launch: OnLaunch = ignore, on_start: OnLaunch = ignore
    ) -> StepResult:
        """Compute a step and plan ahead meanwhile, as the engine does on CUDA.

        on_start: called when the next step's pass is about to be started.
        """

        def launched() -> None:
            on_launch()
            rows = self.scheduler.plan_ahead()
            are_all = self.scheduler.has_all_ahead

            def may_start() -> bool:
                if may := are_all and not self._queue.has_ready:
                    on_start()
                return may

            self.runner.prepare(rows, may_start)

        return self.runner.execute(batch, launched)
