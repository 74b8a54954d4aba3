"""Sampling through scheduler and runner together: each request gets what it gets alone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from support.fake_runner import FakeRunner
from support.oracle import PROMPTS, runner

from vlmserve.models.batch import SamplingParams, StepBatch, TokenLogprobs
from vlmserve.router.config import EngineConfig
from vlmserve.router.engine.engine import Engine
from vlmserve.router.errors import EngineDeadError
from vlmserve.router.messages import AddRequest, FromEngine, SequenceOutput, StepOutputs

DEADLINE_S = 120.0
NUM_TOKENS = 14
WISHES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "num_logprobs": 3},
    {"seed": 1},
    {"seed": 2, "top_k": 8, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 0.0, "repetition_penalty": 1.5, "num_logprobs": 0},
    {"seed": 3, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"seed": 4, "logit_bias": ((5, 8.0), (6, 8.0)), "num_logprobs": 2},
    {"temperature": 0.0, "frequency_penalty": 2.0, "min_tokens": 6},
    {"seed": 5, "min_tokens": 9, "repetition_penalty": 0.7, "temperature": 2.0},
]


pytestmark = pytest.mark.usefixtures("one_thread")


def requests() -> list[AddRequest]:
    """Each wish with a prompt of its own kind, with and without images."""
    made = []
    for number, wish in enumerate(WISHES):
        one = list(PROMPTS.values())[number % len(PROMPTS)]()
        request = AddRequest(
            request_id=str(number),
            prompt_token_ids=one.token_ids,
            images=one.images,
            spans=one.spans,
            sampling=SamplingParams(**wish),
            max_tokens=NUM_TOKENS,
        )
        read = msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=AddRequest)
        made.append(msgspec.structs.replace(read, images=request.images))
    return made


class Answers:
    """What an engine sent, joined by request; as its worker would read it off the wire."""

    def __init__(self, num_requests: int) -> None:
        self.token_ids: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[TokenLogprobs]] = {}
        self.stops: dict[str, int | None] = {}
        self.is_done = asyncio.Event()
        self._num_open = num_requests

    def take(self, _: int, message: FromEngine) -> None:
        assert isinstance(message, StepOutputs), message
        message = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=StepOutputs)
        for output in message.outputs:
            self._join(output)
        if not self._num_open:
            self.is_done.set()

    def _join(self, output: SequenceOutput) -> None:
        self.token_ids.setdefault(output.request_id, []).extend(output.token_ids)
        self.logprobs.setdefault(output.request_id, []).extend(output.logprobs)
        self.stops[output.request_id] = output.stop_token_id
        self._num_open -= output.finish_reason is not None


def answers_of(model: Any, added: Sequence[AddRequest], **settings: Any) -> tuple[Answers, Engine]:
    async def run() -> tuple[Answers, Engine]:
        answers = Answers(len(added))
        config = EngineConfig(model="m", socket_path="s", **settings)
        engine = Engine(model, config, answers.take)
        for request in added:
            engine.add(0, request)
        task = asyncio.create_task(engine.run())
        async with asyncio.timeout(DEADLINE_S):
            done = asyncio.create_task(answers.is_done.wait())
            await asyncio.wait({task, done}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        engine.close(EngineDeadError("over"))
        return answers, engine

    return asyncio.run(run())


def alone() -> dict[str, tuple[list[int], list[TokenLogprobs]]]:
    found = {}
    for request in requests():
        answers, _ = answers_of(runner("tiny"), [request])
        key = request.request_id
        found[key] = (answers.token_ids[key], answers.logprobs[key])
    return found


def test_in_company_and_preempted_each_request_gets_what_it_gets_alone() -> None:
    """Few text blocks, so that most are preempted and recomputed in small chunks."""
    expected = alone()
    settings = {"prefix_cache": False, "image_cache": False}
    settings |= {"max_num_batched_tokens": 24, "max_num_seqs": 24}
    answers, engine = answers_of(runner("tiny", 26, 40), requests(), **settings)
    assert engine.scheduler.snapshot().num_preemptions > 0
    assert answers.token_ids == {key: token_ids for key, (token_ids, _) in expected.items()}
    for key, (_, logprobs) in expected.items():
        count = WISHES[int(key)].get("num_logprobs")
        got = answers.logprobs[key]
        assert len(got) == len(logprobs) == (0 if count is None else NUM_TOKENS)
        for one, other in zip(got, logprobs, strict=True):
            assert len(one.top_token_ids) == count
            assert one.top_token_ids == other.top_token_ids
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert one.top_logprobs == pytest.approx(other.top_logprobs, abs=1e-4)


def test_a_frequency_penalty_leaves_no_token_to_be_repeated_for_ever() -> None:
    plain = AddRequest(
        request_id="plain",
        prompt_token_ids=[5, 6, 7],
        max_tokens=30,
        sampling=SamplingParams(temperature=0.0, logit_bias=((9, 20.0),)),
    )
    penalties = msgspec.structs.replace(plain.sampling, frequency_penalty=2.0)
    added = [plain, msgspec.structs.replace(plain, request_id="p", sampling=penalties)]
    answers, _ = answers_of(runner("tiny"), added)
    assert answers.token_ids["plain"] == [9] * 30
    assert answers.token_ids["p"].count(9) in range(5, 15)


def test_ids_that_end_the_answer_come_after_min_tokens_only() -> None:
    """A biased end of turn is chosen as soon as it may be."""
    added = [
        AddRequest(
            request_id=str(min_tokens),
            prompt_token_ids=[5, 6, 7],
            max_tokens=20,
            eos_token_ids=[10],
            stop_token_ids=[11],
            sampling=SamplingParams(
                temperature=0.0, logit_bias=((10, 90.0), (11, 100.0)), min_tokens=min_tokens
            ),
        )
        for min_tokens in (0, 1, 7, 20)
    ]
    answers, _ = answers_of(runner("tiny"), added)
    for min_tokens in (0, 1, 7):
        token_ids = answers.token_ids[str(min_tokens)]
        assert len(token_ids) == min_tokens + 1
        assert not {10, 11} & set(token_ids[:-1])
        assert (token_ids[-1], answers.stops[str(min_tokens)]) == (11, 11)
    assert len(answers.token_ids["20"]) == 20
    assert not {10, 11} & set(answers.token_ids["20"])


def test_only_allowed_tokens_come_and_no_banned_sequence() -> None:
    plain = AddRequest(
        request_id="plain",
        prompt_token_ids=[5, 6, 7],
        max_tokens=30,
        sampling=SamplingParams(temperature=0.0, logit_bias=((9, 95.0), (12, 70.0), (13, 40.0))),
    )
    wishes: dict[str, dict[str, Any]] = {
        # The prompt's 7 is not generated, so the first 9 is no end of the pair 7, 9.
        "pair": {"banned_sequences": ((9, 9), (7, 9))},
        "one": {"banned_sequences": ((9,),)},
        "three": {"banned_sequences": ((9, 9, 9), (12, 12))},
        "allowed": {"allowed_token_ids": (12, 13), "banned_sequences": ((12, 12),)},
        "drawn": {"allowed_token_ids": (20, 21, 22, 999_999), "temperature": 2.0, "top_p": 0.9},
    }
    added = [
        msgspec.structs.replace(
            plain, request_id=name, sampling=msgspec.structs.replace(plain.sampling, **wish)
        )
        for name, wish in wishes.items()
    ]
    answers, _ = answers_of(runner("tiny"), [plain, *added])
    got = answers.token_ids
    assert got["plain"] == [9] * 30
    assert got["pair"] == [9, 12] * 15
    assert got["one"] == [12] * 30
    assert got["three"] == [9, 9, 12] * 10
    assert got["allowed"] == [12, 13] * 15
    assert set(got["drawn"]) == {20, 21, 22}


def test_a_step_is_told_of_the_text_only_where_the_choice_depends_on_it() -> None:
    batches: list[StepBatch] = []
    generated: dict[str, list[int]] = {}

    def keep(batch: StepBatch) -> None:
        batches.append(batch)
        for one in batch.sequences:
            if one.context is not None:
                generated[one.request_id] = list(one.context.generated_token_ids)

    wishes: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 1.0},
        {"min_tokens": 2, "num_logprobs": 5},
    ]
    added = [
        AddRequest(
            request_id=str(number),
            prompt_token_ids=[8, 8, 9],
            max_tokens=3,
            eos_token_ids=[1001],
            sampling=SamplingParams(seed=number, **wish),
        )
        for number, wish in enumerate(wishes)
    ]
    answers, _ = answers_of(FakeRunner(before_step=keep), added)
    last = {one.request_id: one for one in batches[-1].sequences}
    assert last["0/0"].context is None
    assert last["0/3"].context is None
    first = {one.request_id: one.context for one in batches[0].sequences}
    assert first["0/3"] is not None
    assert list(first["0/3"].banned_token_ids) == [1001]
    repeated, present = last["0/1"].context, last["0/2"].context
    assert repeated is not None
    assert present is not None
    assert sorted(repeated.prompt_token_ids) == [8, 9]
    assert list(present.prompt_token_ids) == []
    assert generated["0/1"] == answers.token_ids["1"][:2]
    assert generated["0/2"] == answers.token_ids["2"][:2]
