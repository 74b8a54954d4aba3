"""The true scheduler over the true runner: greedy tokens against the oracle, in any company.

float32 on a CPU, tiny random checkpoints. A token that differs from the oracle's best is excused
only where the oracle's two best logits there lie within 1e-4 (rounding decides between them).
"""

from __future__ import annotations

import numpy as np
import pytest
from support.oracle import (
    GREEDY,
    count_excuses,
    loaded,
    random_request,
)
from support.stepped import MAX_MODEL_LEN, SteppedEngine, message

from vlmserve.models.batch import PoolSizes, SamplingParams
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.kv_cache.pool_sizes import PoolPlan

POOLS = PoolSizes(num_text_blocks=16, num_image_blocks=12, block_size=4)


def engine(layout: str = "tiny", max_num_batched_tokens: int = 24) -> SteppedEngine:
    """Tiny pools under a runner of that layout."""
    runner = ModelRunner(loaded(layout), PoolPlan(POOLS, MAX_MODEL_LEN))
    return SteppedEngine(runner, {"max_num_batched_tokens": max_num_batched_tokens})


@pytest.mark.parametrize("layout", ["tiny", pytest.param("cross-first", marks=pytest.mark.slow)])
def test_greedy_tokens_equal_the_oracle_under_arrivals_aborts_and_preemption(layout: str) -> None:
    rng, running = np.random.default_rng(3), engine(layout)
    requests = [random_request(rng, str(i), GREEDY) for i in range(48)]
    waiting, excuses = list(requests), 0
    aborts = {str(i) for i in range(0, 48, 3)}
    while waiting or running.scheduler.has_work:
        for _ in range(min(len(waiting), int(rng.integers(0, 4)))):
            running.add(message(waiting.pop(0), max_tokens=int(rng.integers(1, 30))))
        for name in sorted(aborts & running.sequences.keys()):
            if rng.random() < 0.1:
                running.abort(name)
        running.step()
    for request in requests:
        excuses += count_excuses(layout, request, running.generated(request.request_id))
    assert excuses <= 1
    assert running.scheduler.snapshot().num_preemptions > 0, (
        "the pools are too large to test preemption"
    )
    running.assert_all_free()


def test_a_seeded_request_gives_the_same_output_whatever_else_runs() -> None:
    rng = np.random.default_rng(4)
    requests = [
        random_request(rng, str(i), SamplingParams(temperature=0.9, top_p=0.95, seed=i))
        for i in range(12)
    ]
    together = engine()
    for request in requests:
        together.add(message(request, max_tokens=24))
    together.run()
    assert together.scheduler.snapshot().num_preemptions > 0
    for request in requests:
        alone = engine(max_num_batched_tokens=5)
        alone.add(message(request, max_tokens=24))
        alone.run()
        name = request.request_id
        assert together.generated(name) == alone.generated(name)
