"""Several answers to one prompt on true models: each token's logits are the oracle's.

float32 on a CPU, within 2e-5 of the log-softmax of the oracle's logits (they are of order 1), which
is computed anew for each whole answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from msgspec.structs import replace
from support.oracle import PROMPTS, Request, oracle_logits, prompt, runner
from support.stepped import SteppedEngine

from vlmserve.models.batch import (
    ModelInfo,
    OnLaunch,
    SamplingParams,
    StepBatch,
    StepResult,
    TokenMatcher,
)
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.router.messages import AddRequest

TOLERANCE = 2e-5
LENGTH = 8


@dataclass
class Listener:
    """A runner that keeps the log-probability of every token that it sampled."""

    runner: ModelRunner
    logprobs: dict[str, list[float]] = field(default_factory=dict)

    @property
    def info(self) -> ModelInfo:
        return self.runner.info

    def execute(self, batch: StepBatch, *on_launch: OnLaunch) -> StepResult:
        result = self.runner.execute(batch, *on_launch)
        for request_id, one in result.logprobs.items():
            self.logprobs.setdefault(request_id, []).append(one.logprob)
        return result

    def compile_grammar(self, grammar: str, eos_token_ids: list[int], tenant: str) -> TokenMatcher:
        return self.runner.compile_grammar(grammar, eos_token_ids, tenant)


def request_of(one: Request, **sampling) -> AddRequest:
    return AddRequest(
        request_id="a",
        prompt_token_ids=one.token_ids,
        images=one.images,
        spans=one.spans,
        sampling=SamplingParams(num_logprobs=0, **sampling),
        max_tokens=LENGTH,
        choice_ids=["b", "c", "d"],
    )


def run(layout: str, request: AddRequest, **limits) -> tuple[SteppedEngine, Listener]:
    listener = Listener(runner(layout))
    engine = SteppedEngine(listener, limits)
    engine.add(request)
    engine.run()
    engine.assert_all_free()
    return engine, listener


def assert_as_oracle(layout: str, one: Request, generated: list[int], told: list[float]) -> None:
    whole = prompt("whole", "x")
    whole.token_ids, whole.images, whole.spans = one.token_ids + generated, one.images, one.spans
    expected = oracle_logits(layout, whole)[len(one.token_ids) - 1 : -1].log_softmax(-1)
    assert len(told) == len(generated) == LENGTH
    for token_id, logprob, row in zip(generated, told, expected, strict=True):
        assert logprob == pytest.approx(float(row[token_id]), abs=TOLERANCE)


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("layout", ["tiny", "cross-first"])
def test_each_answer_is_the_oracles_and_the_prompt_is_computed_once(layout, name, prefix_cache):
    one = PROMPTS[name]()
    request = request_of(one, temperature=1.0, seed=7)
    engine, listener = run(layout, request, prefix_cache=prefix_cache)
    assert engine.num_tokens == len(one.token_ids) + 3 + 4 * (LENGTH - 1)
    assert engine.scheduler.snapshot().num_images_encoded == len(one.images)
    for choice in "abcd":
        assert_as_oracle(layout, one, engine.generated(choice), listener.logprobs[choice])
    assert len({tuple(engine.generated(choice)) for choice in "abcd"}) > 1


@pytest.mark.parametrize("limits", [{}, {"max_num_seqs": 2}, {"max_num_batched_tokens": 5}])
def test_a_seeded_answer_is_the_one_that_its_seed_gives_alone(limits):
    request = request_of(PROMPTS["apart"](), temperature=1.0, seed=7)
    engine, _ = run("tiny", request, **limits)
    for choice in "abcd":
        sampling = engine.sequences[choice].sampling
        alone, _ = run("tiny", replace(request, sampling=sampling, choice_ids=[]))
        assert engine.generated(choice) == alone.generated("a")


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_answers_are_all_the_same(name):
    engine, listener = run("tiny", request_of(PROMPTS[name](), temperature=0.0))
    assert len({tuple(engine.generated(choice)) for choice in "abcd"}) == 1
    assert_as_oracle("tiny", PROMPTS[name](), engine.generated("d"), listener.logprobs["d"])
