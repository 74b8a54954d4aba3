"""An engine on tiny pools whose decode steps are replayed by eager passes, and started ahead.

Owns what stands in for `DecodeGraphs`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from support.oracle import loaded
from support.stepped import MAX_MODEL_LEN, SteppedEngine

from vlmserve.models.batch import PoolSizes, SamplingParams
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.kv_cache.pool_sizes import PoolPlan
from vlmserve.models.kv_cache.step_inputs import StepInputs
from vlmserve.models.kv_cache.step_tensors import Hidden, send

POOLS = PoolSizes(num_text_blocks=16, num_image_blocks=12, block_size=4)
# how three requests that run beside each other sample: three different ways to a token
ALIKE = {
    "a": SamplingParams(temperature=0.0, frequency_penalty=0.5, num_logprobs=2),
    "b": SamplingParams(temperature=0.9, seed=3),
    "c": SamplingParams(temperature=0.7, top_k=20, seed=4),
}


class EagerGraphs:
    """Takes the steps that are recorded, and computes them eagerly, all into the same memory."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._states: torch.Tensor | None = None

    def takes(self, inputs: StepInputs, has_adapters: bool = False) -> bool:
        return inputs.text_rows.num_queries == len(inputs.text_rows.key_lens)

    def stage(self, inputs: StepInputs) -> StepInputs | None:
        return inputs if self.takes(inputs) else None

    def replay_staged(
        self, staged: StepInputs, token_ids: torch.Tensor, places: list[int]
    ) -> Hidden:
        chosen = token_ids[torch.tensor(places)].clamp(min=0)
        return self.replay(replace(staged, token_ids=chosen.numpy()))

    def replay(self, inputs: StepInputs, row_slots: Any = None) -> Hidden:
        runner = self._runner
        own = send(inputs, None, runner._backend, torch.device("cpu"), torch.float32)
        assert runner._fused is not None
        with torch.inference_mode():
            states = runner._fused(
                own.token_ids, own.positions, None, own.row_mask, runner.pools, own.step
            )
        if self._states is None:
            self._states = states.new_zeros(64, states.shape[-1])
        return Hidden(self._states[: len(states)].copy_(states), own.sampled)


def engine(layout: str = "tiny", pools: PoolSizes = POOLS, **limits: Any) -> SteppedEngine:
    runner = ModelRunner(loaded(layout), PoolPlan(pools, MAX_MODEL_LEN))
    runner._graphs = EagerGraphs(runner)  # type: ignore[assignment]
    return SteppedEngine(runner, limits, plans_ahead=True)
