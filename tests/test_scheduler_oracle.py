"""The true scheduler over the true runner: greedy tokens against the oracle, in any company.

float32 on a CPU, tiny random checkpoints. A token that differs from the oracle's best is excused
only where the oracle's two best logits there lie within 1e-4 (rounding decides between them).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from vlmserve.models.batch import PoolSizes, SamplingParams
from vlmserve.models.pools import PoolPlan
from vlmserve.models.runner import ModelRunner
from vlmserve.router.messages import AddRequest
from vlmserve.router.queue import QueueLimits, RequestQueue
from vlmserve.router.scheduler import Scheduler, SchedulerLimits
from vlmserve.router.sequence import Sequence
from vlmserve.tests.helpers_models import (
    GREEDY,
    Request,
    image,
    loaded,
    oracle_logits,
    prompt,
)

EXCUSED_GAP = 1e-4
POOLS = PoolSizes(num_text_blocks=16, num_image_blocks=12, block_size=4)


@dataclass
class Engine:
    """A scheduler and a runner on tiny pools, stepped by hand."""

    layout: str = "tiny"
    pools: PoolSizes = POOLS
    max_num_batched_tokens: int = 24
    sequences: dict[str, Sequence] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.runner = ModelRunner(loaded(self.layout), PoolPlan(self.pools, 64))
        limits = SchedulerLimits(
            max_num_seqs=8,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_batched_images=2,
            max_model_len=64,
        )
        self.queue = RequestQueue(QueueLimits(1000, 10**6, 10**9))
        self.scheduler = Scheduler(self.runner.info, limits, self.queue)

    def add(self, request: Request, max_tokens: int) -> None:
        message = AddRequest(
            request_id=request.request_id,
            prompt_token_ids=request.token_ids,
            images=request.images,
            spans=request.spans,
            sampling=request.sampling,
            max_tokens=max_tokens,
        )
        self.sequences[request.request_id] = Sequence(request.request_id, 0, message)
        self.queue.put(self.sequences[request.request_id])

    def step(self) -> bool:
        batch = self.scheduler.schedule()
        if batch is None:
            return False
        self.scheduler.update(self.runner.execute(batch))
        self.scheduler.check()
        return True

    def generated(self, name: str) -> list[int]:
        sequence = self.sequences[name]
        return sequence.token_ids[len(sequence.request.prompt_token_ids) :]


def random_request(rng: np.random.Generator, name: str, sampling: SamplingParams) -> Request:
    """A short prompt with none, one or two images, adjacent or apart; pictures recur."""
    num_images = int(rng.choice([0, 0, 1, 1, 2]))
    letters = list("abcdefgh"[: rng.integers(1, 9)]) + ["|"] * num_images
    text = "".join(rng.permutation(letters)) + "?"
    grids = [int(rng.integers(1, 9)) for _ in range(num_images)]
    request = prompt(name, text, [image(grid, grid) for grid in grids])
    request.sampling = sampling
    return request


def count_excuses(layout: str, request: Request, generated: list[int]) -> int:
    """0 if all tokens are the oracle's, 1 if the first other one is a near tie; else fails."""
    whole = prompt("whole", "x")
    whole.token_ids, whole.images = request.token_ids + generated, request.images
    whole.spans = request.spans
    logits = oracle_logits(layout, whole)[len(request.token_ids) - 1 : -1]
    for token_id, row in zip(generated, logits, strict=True):
        best = row.topk(2)
        if token_id != best.indices[0]:
            gap = float(best.values[0] - best.values[1])
            assert gap <= EXCUSED_GAP, f"{request.request_id}: {gap} apart"
            assert token_id == best.indices[1]
            return 1
    return 0


@pytest.mark.parametrize("layout", ["tiny", "cross-first"])
def test_greedy_tokens_equal_the_oracle_under_arrivals_aborts_and_preemption(layout: str) -> None:
    rng, engine = np.random.default_rng(3), Engine(layout)
    requests = [random_request(rng, str(i), GREEDY) for i in range(48)]
    waiting, excuses = list(requests), 0
    aborts = {str(i) for i in range(0, 48, 3)}
    while waiting or engine.scheduler.has_work:
        for _ in range(min(len(waiting), int(rng.integers(0, 4)))):
            engine.add(waiting.pop(0), max_tokens=int(rng.integers(1, 30)))
        for name in sorted(aborts & engine.sequences.keys()):
            if rng.random() < 0.1:
                engine.scheduler.abort(engine.sequences[name])
        engine.step()
    for request in requests:
        excuses += count_excuses(layout, request, engine.generated(request.request_id))
    assert excuses <= 1
    assert engine.scheduler.num_preemptions > 0, "the pools are too large to test preemption"
    assert engine.scheduler.text_pool.num_used == 0
    assert engine.scheduler.image_pool.blocks.num_used == 0


def test_a_seeded_request_gives_the_same_output_whatever_else_runs() -> None:
    rng = np.random.default_rng(4)
    requests = [
        random_request(rng, str(i), SamplingParams(temperature=0.9, top_p=0.95, seed=i))
        for i in range(12)
    ]
    together = Engine()
    for request in requests:
        together.add(request, max_tokens=24)
    while together.step():
        pass
    assert together.scheduler.num_preemptions > 0
    for request in requests:
        alone = Engine(max_num_batched_tokens=5)
        alone.add(request, max_tokens=24)
        while alone.step():
            pass
        name = request.request_id
        assert together.generated(name) == alone.generated(name)
