"""The true scheduler over a runner on tiny pools, stepped by hand.

Owns no model: the runner is handed in. Every step checks both pools from scratch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vlmserve.router.engine.runner_protocol import Runner
from vlmserve.router.messages import AddRequest
from vlmserve.router.scheduler.interface import SchedulerLimits
from vlmserve.router.scheduler.request_queue import QueueLimits, RequestQueue
from vlmserve.router.scheduler.scheduler import Scheduler
from vlmserve.router.scheduler.sequence import Sequence

MAX_MODEL_LEN = 64


@dataclass
class SteppedEngine:
    """A scheduler and a runner. `limits` change fields of SchedulerLimits.

    plans_ahead: lay out the next step while one is computed, and let the runner start it. All
    steps seem to take as long, so a step has as many drafts as it may.
    """

    runner: Runner
    limits: dict[str, Any] = field(default_factory=dict)
    sequences: dict[str, Sequence] = field(default_factory=dict)
    num_tokens: int = 0
    plans_ahead: bool = False

    def __post_init__(self) -> None:
        fields = {
            "max_num_seqs": 8,
            "max_num_batched_tokens": 24,
            "max_num_batched_images": 2,
            "max_model_len": MAX_MODEL_LEN,
        }
        self.queue = RequestQueue(QueueLimits(1000, 10**6, 10**9))
        limits = SchedulerLimits(**(fields | self.limits))
        self.scheduler = Scheduler(self.runner.info, limits, self.queue)

    def add(self, request: AddRequest) -> None:
        sequences = Sequence.of(0, request)
        for sequence in sequences:
            sequence.sequence_id = sequence.request_id
            self.sequences[sequence.request_id] = sequence
        self.queue.put(sequences[0])

    def abort(self, request_id: str) -> None:
        self.scheduler.abort(self.sequences[request_id])

    def step(self) -> bool:
        """Plan, compute and take in one step; False if there is nothing to do."""
        batch = self.scheduler.schedule()
        if batch is None:
            return False
        self.num_tokens += batch.num_tokens
        self.scheduler.update(self.runner.execute(batch, self._launched), 1.0)
        self.scheduler.check()
        return True

    def _launched(self) -> None:
        """As the engine's loop does when a step is launched."""
        if self.plans_ahead:
            rows = self.scheduler.plan_ahead()
            are_all = self.scheduler.has_all_ahead
            self.runner.prepare(rows, lambda: are_all and not self.queue.has_ready)

    def run(self) -> int:
        """Step until all is done; how many tokens the steps computed."""
        before = self.num_tokens
        while self.step():
            pass
        return self.num_tokens - before

    def generated(self, request_id: str) -> list[int]:
        sequence = self.sequences[request_id]
        return sequence.token_ids[len(sequence.request.prompt_token_ids) :]

    def assert_all_free(self) -> None:
        assert self.scheduler.snapshot().text.used == 0
        assert self.scheduler.snapshot().images.used == 0
        assert len(self.queue) == 0
        self.scheduler.check()


def time_all_steps_alike(scheduler: Scheduler) -> None:
    """Let a scheduler believe that its steps take as long, so that drafts depend on no clock."""
    update = scheduler.update
    scheduler.update = lambda result, _=None: update(result, 1.0)  # type: ignore[method-assign]


def message(request: Any, max_tokens: int) -> AddRequest:
    """A hand-made request of `support/oracle.py`, as a worker sends it."""
    return AddRequest(
        request_id=request.request_id,
        prompt_token_ids=request.token_ids,
        images=request.images,
        spans=request.spans,
        sampling=request.sampling,
        max_tokens=max_tokens,
    )
