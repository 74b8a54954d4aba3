"""The next step's decodes planned and laid out while a step is computed: the same answers, sooner.

What the rows hold is compared in every test: the fake runner raises where a row that was planned
ahead is not what it was when it is computed. test_scheduler_mixes.py mixes all of this.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from dataclasses import fields

import numpy as np
import pytest
from support.fake_runner import FakeRunner, expected_token_ids, fake_image
from support.oracle import PROMPTS, runner
from support.scheduler_bench import Bench

from vlmserve.models.batch import (
    ImageSpan,
    OnLaunch,
    PoolSizes,
    SamplingParams,
    StepBatch,
    StepResult,
    never,
)
from vlmserve.models.kv_cache.step_inputs import PreparedRows, StepInputs, pack
from vlmserve.router.config import EngineConfig
from vlmserve.router.engine.engine import Engine
from vlmserve.router.messages import AddRequest, FromEngine, RequestFailed, StepOutputs

DEADLINE_S = 120.0


def request_of(request_id: str, max_tokens: int = 6, **fields) -> AddRequest:
    return AddRequest(
        request_id=request_id, prompt_token_ids=[1, 2, 3], max_tokens=max_tokens, **fields
    )


# The scheduler


def test_every_decode_behind_a_step_is_planned_while_it_is_computed():
    bench = Bench(plans_ahead=True)
    asked = [request_of(name) for name in "abc"]
    for request in asked:
        bench.add(request)
    bench.run()
    assert {one.request_id: bench.tokens[one.request_id] for one in asked} == {
        one.request_id: expected_token_ids(one) for one in asked
    }
    assert bench.runner.num_rows_ahead == 3 * 5  # of six tokens each the prompt's step gave one
    bench.assert_all_free()


def test_a_row_of_who_ends_is_passed_over_and_its_block_is_free_again():
    """It ends by a stop id, which nobody could know when its next block was taken."""
    bench = Bench(pools=PoolSizes(8, 4, 3), plans_ahead=True)
    alone = request_of("a", max_tokens=20)
    last = expected_token_ids(alone)[0]
    ending = request_of("a", max_tokens=20, stop_token_ids=[last])
    bench.add(ending)
    bench.add(request_of("b", max_tokens=6))
    batch = bench.plan()
    assert batch is not None
    assert bench.scheduler.snapshot().text.used == 4  # one each for what comes
    bench.finish(batch)
    assert bench.endings == {"a": "stop"}
    assert bench.scheduler.snapshot().text.used == 2
    bench.run()
    assert bench.runner.num_rows_ahead == 5
    bench.assert_all_free()


def test_no_block_is_taken_ahead_that_is_not_free():
    bench = Bench(pools=PoolSizes(2, 4, 4), max_model_len=8, plans_ahead=True, prefix_cache=False)
    asked = [
        AddRequest(request_id=name, prompt_token_ids=[1, 2, 3, 4], max_tokens=4) for name in "ab"
    ]
    for request in asked:
        bench.add(request)
    bench.run()
    for request in asked:
        assert bench.tokens[request.request_id] == expected_token_ids(request)
    bench.assert_all_free()


def test_a_token_that_is_the_last_in_any_case_has_nothing_planned_behind_it():
    bench = Bench(plans_ahead=True)
    bench.add(request_of("a", max_tokens=1))
    batch = bench.plan()
    assert batch is not None
    assert bench.rows_ahead == []


def test_penalties_and_banned_ids_see_the_newest_token():
    bench = Bench(plans_ahead=True)
    sampling = SamplingParams(temperature=0.0, presence_penalty=1.0, min_tokens=2)
    bench.add(request_of("a", sampling=sampling, eos_token_ids=[1001]))
    told = []
    while (batch := bench.plan()) is not None:
        context = batch.sequences[0].context
        assert context is not None
        told.append((list(context.generated_token_ids), list(context.banned_token_ids)))
        bench.finish(batch)
    answer = bench.tokens["a"]
    assert told == [(answer[:count], [1001] if count < 2 else []) for count in range(6)]
    assert bench.runner.num_rows_ahead == 5


def test_a_banned_sequence_sees_the_newest_token():
    bench = Bench(plans_ahead=True)
    alone = expected_token_ids(request_of("a"))
    sequences = ((alone[0], 77), (alone[1], alone[2], 78), (79,))
    sampling = SamplingParams(temperature=0.0, banned_sequences=sequences)
    bench.add(request_of("a", sampling=sampling))
    told = []
    while (batch := bench.step()) is not None:
        context = batch.sequences[0].context
        assert context is not None
        told.append(list(context.banned_token_ids))
    assert told[:4] == [[79], [79, 77], [79], [79, 78]]


def test_after_a_failed_step_nothing_that_was_planned_ahead_is_used():
    bench = Bench(plans_ahead=True)
    bench.add(request_of("a"))
    bench.step()
    batch = bench.plan()
    assert batch is not None
    bench.fail(batch, is_computed=True)
    bench.add(request_of("b"))
    bench.run()
    assert bench.tokens["b"] == expected_token_ids(request_of("b"))
    bench.assert_all_free()


# Laying rows out


def assert_same_inputs(got: StepInputs, expected: StepInputs) -> None:
    for one in fields(StepInputs):
        left, right = getattr(got, one.name), getattr(expected, one.name)
        if isinstance(left, np.ndarray):
            np.testing.assert_array_equal(left, right)
            assert left.dtype == right.dtype
        elif one.name.endswith("_rows") and left is not None:
            for part in ("query_start_loc", "key_lens", "block_table"):
                np.testing.assert_array_equal(getattr(left, part), getattr(right, part))
        else:
            assert left == right


def test_prepared_rows_are_packed_as_the_same_rows_with_their_tokens():
    bench = Bench(max_num_batched_tokens=64)
    picture = {"images": [fake_image("p", 2)], "spans": [ImageSpan(1)]}
    bench.add(request_of("a", **picture))
    bench.add(request_of("b", max_tokens=9))
    first = bench.plan()
    assert first is not None
    prepared = PreparedRows.of(bench.scheduler.plan_ahead(), 4, 5)
    bench.finish(first)
    batch = bench.plan()
    assert batch is not None
    assert prepared.are_all_of(batch)
    assert_same_inputs(prepared.with_tokens(), pack(batch, 4, 5))
    assert not prepared.are_all_of(StepBatch(batch.sequences[:1]))
    assert not prepared.are_all_of(StepBatch(batch.sequences[::-1]))


# The engine


class Answers:
    """What an engine sent, by request."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.endings: dict[str, str] = {}
        self.changed = asyncio.Event()

    def take(self, worker_id: int, message: FromEngine) -> None:
        if isinstance(message, RequestFailed):
            self._end(message.request_id, "failed")
        if isinstance(message, StepOutputs):
            for one in message.outputs:
                assert one.request_id not in self.endings, "an output after the last one"
                self.tokens[one.request_id] += one.token_ids
                if one.finish_reason is not None:
                    self._end(one.request_id, one.finish_reason)
        self.changed.set()

    def _end(self, request_id: str, ending: str) -> None:
        assert request_id not in self.endings, "two final messages"
        self.endings[request_id] = ending

    async def ended(self, *request_ids: str) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not set(request_ids) <= self.endings.keys():
                self.changed.clear()
                await self.changed.wait()


def engine_on(model, answers: Answers, **options) -> Engine:
    config = EngineConfig(model="fake", socket_path="", **options)
    return Engine(model, config, answers.take)


async def answered(model, asked: list[AddRequest], **options) -> dict[str, list[int]]:
    """The tokens of all requests, asked at once."""
    answers = Answers()
    engine = engine_on(model, answers, **options)
    for request in asked:
        engine.add(1, request)
    running = asyncio.create_task(engine.run())
    await answers.ended(*(one.request_id for one in asked))
    running.cancel()
    assert engine.stats().text_blocks_used == 0
    engine.scheduler.check()
    return dict(answers.tokens)


@pytest.mark.parametrize(
    ("device", "plan_ahead", "plans_ahead"),
    [("cuda:0", None, True), ("cpu", None, False), ("cuda:0", False, False), ("cpu", True, True)],
)
def test_by_default_a_gpu_plans_ahead(device: str, plan_ahead: bool | None, plans_ahead: bool):
    config = EngineConfig(model="fake", socket_path="", plan_ahead=plan_ahead)
    assert config.plans_ahead(device) == plans_ahead


class LateLauncher(FakeRunner):
    """Its launch is over when its step has begun; the step waits until the next is prepared.

    may_start: of each step, whether the next could be started at its end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_prepared = threading.Event()
        self.may_start: list[bool] = []

    def prepare(self, rows, may_start=never) -> None:
        super().prepare(rows)
        self._may_start = may_start
        self.is_prepared.set()

    def execute(self, batch: StepBatch, *on_launch: OnLaunch) -> StepResult:
        self.is_prepared.clear()

        def launched() -> None:
            on_launch[0]()
            assert self.is_prepared.wait(DEADLINE_S)

        # what was prepared is looked at before, as this step's rows would be lost otherwise
        result = super().execute(batch, launched)
        self.may_start.append(self._may_start())
        return result


def test_the_engine_plans_while_the_step_is_computed():
    model = LateLauncher()
    asked = [request_of(name, max_tokens=12) for name in "abcd"]
    tokens = asyncio.run(answered(model, asked, plan_ahead=True))
    assert tokens == {one.request_id: expected_token_ids(one) for one in asked}
    assert model.num_rows_ahead == 4 * 11
    assert model.may_start == [True] * 11 + [False]


def test_the_next_step_is_not_started_without_a_request_that_arrived():
    """It waits for its first chunk no longer than before."""

    async def scenario() -> None:
        model, answers = LateLauncher(), Answers()
        engine = engine_on(model, answers, plan_ahead=True)
        loop = asyncio.get_running_loop()

        def before(batch: StepBatch) -> None:
            if model.num_steps == 3:
                added = threading.Event()
                loop.call_soon_threadsafe(
                    lambda: (engine.add(1, request_of("b", max_tokens=1)), added.set())
                )
                assert added.wait(DEADLINE_S)

        model.before_step = before
        engine.add(1, request_of("a", max_tokens=10))
        running = asyncio.create_task(engine.run())
        await answers.ended("a", "b")
        running.cancel()
        # b arrives in the fourth step and is computed in the fifth, of which it ends
        assert model.may_start[:6] == [True, True, True, False, False, True]

    asyncio.run(scenario())


def test_an_aborted_request_ends_with_the_step_that_computes_it():
    """Its next row was planned already; the others go on, and every block is free at the end."""

    async def scenario() -> None:
        model, answers = LateLauncher(), Answers()
        engine = engine_on(model, answers, plan_ahead=True)
        may_abort = asyncio.Event()
        loop = asyncio.get_running_loop()

        def before(batch: StepBatch) -> None:
            if model.num_steps == 3:
                loop.call_soon_threadsafe(may_abort.set)

        model.before_step = before
        for name in "ab":
            engine.add(1, request_of(name, max_tokens=30))
        running = asyncio.create_task(engine.run())
        await may_abort.wait()
        engine.abort(1, ["a"])
        await answers.ended("a", "b")
        running.cancel()
        assert answers.endings == {"a": "abort", "b": "length"}
        assert answers.tokens["b"] == expected_token_ids(request_of("b", max_tokens=30))
        assert engine.stats().text_blocks_used == 0

    asyncio.run(scenario())


def test_a_step_that_fails_before_its_launch_costs_its_own_requests_only():
    async def scenario() -> None:
        model, answers = FakeRunner(), Answers()
        engine = engine_on(model, answers, plan_ahead=True)

        def fail_once(batch: StepBatch, *on_launch: OnLaunch) -> StepResult:
            del model.execute
            raise RuntimeError("no")

        model.execute = fail_once
        engine.add(1, request_of("a"))
        running = asyncio.create_task(engine.run())
        await answers.ended("a")
        engine.add(1, request_of("b"))
        await answers.ended("b")
        running.cancel()
        assert answers.endings == {"a": "failed", "b": "length"}
        assert answers.tokens["b"] == expected_token_ids(request_of("b"))

    asyncio.run(scenario())


def asked() -> list[AddRequest]:
    """Greedy and sampled answers, penalties, logarithms, several answers, and pictures."""
    params = {
        "text": SamplingParams(temperature=0.0),
        "one": SamplingParams(temperature=0.9, seed=3, num_logprobs=2),
        "adjacent": SamplingParams(temperature=0.0, repetition_penalty=1.3, presence_penalty=0.5),
        "three": SamplingParams(temperature=0.7, top_p=0.8, seed=5, min_tokens=4),
    }
    return [
        AddRequest(
            request_id=name,
            prompt_token_ids=(prompt := PROMPTS[name]()).token_ids,
            images=prompt.images,
            spans=prompt.spans,
            sampling=sampling,
            max_tokens=6 + len(name),
            choice_ids=["second"] if name == "one" else [],
        )
        for name, sampling in params.items()
    ]


def test_the_model_answers_alike_whether_it_is_planned_ahead_or_not(monkeypatch):
    answers = []
    num_used = 0

    def used(prepared: PreparedRows) -> StepInputs:
        nonlocal num_used
        num_used += 1
        return with_tokens(prepared)

    with_tokens = PreparedRows.with_tokens
    monkeypatch.setattr(PreparedRows, "with_tokens", used)
    for plan_ahead in (False, True):
        model = runner("tiny")
        tokens = asyncio.run(answered(model, asked(), plan_ahead=plan_ahead))
        answers.append(tokens)
        assert (num_used > 0) == plan_ahead
    assert answers[0] == answers[1]
    assert len(answers[0]["second"]) == 9
