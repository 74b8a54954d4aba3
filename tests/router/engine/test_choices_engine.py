"""Several answers to one prompt over the engine's real socket: each ends by itself."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest
from msgspec.structs import replace
from support.engine_side import engine_at
from support.fake_runner import FakeRunner, expected_token_ids, fake_image, fake_info
from support.polling import until

from vlmserve.models.batch import ImageSpan, PoolSizes, SamplingParams
from vlmserve.router.client.engine_client import EngineClient
from vlmserve.router.errors import EngineInternalError
from vlmserve.router.messages import AddRequest
from vlmserve.router.scheduler.sequence import Sequence

DEADLINE_S = 120.0
REQUEST = AddRequest(
    request_id="a",
    prompt_token_ids=list(range(10)),
    images=[fake_image("p", 2)],
    spans=[ImageSpan(3)],
    sampling=SamplingParams(seed=5),
    max_tokens=6,
    choice_ids=["b", "c", "d"],
)


def expected(request: AddRequest) -> dict[str, list[int]]:
    """What each choice answers alone, by its id."""
    return {
        one.request_id: expected_token_ids(replace(request, sampling=one.sampling))
        for one in Sequence.of(0, request)
    }


@contextlib.asynccontextmanager
async def engine_and_client(tmp_path, before_step=None, **options):
    """A runner on a small pool, its engine and a client, all free again at the end."""
    path = tmp_path / "engine.sock"
    runner = FakeRunner(fake_info(PoolSizes(64, 4, 4), 64), before_step=before_step)
    async with asyncio.timeout(DEADLINE_S), engine_at(path, runner, **options) as engine:
        client = EngineClient(str(path))
        await client.connect(5)
        await client.wait_ready(5)
        try:
            yield engine, client
            assert client.num_open_requests == 0
            await until(lambda: not engine.scheduler.has_work)
            engine.scheduler.check()
            stats = engine.stats()
            assert (stats.text_blocks_used, stats.image_blocks_used) == (0, 0)
            assert not engine.snapshot().open
        finally:
            await client.close()


async def answers_of(client: EngineClient, request: AddRequest) -> dict[str, list[int]]:
    answers: dict[str, list[int]] = {name: [] for name in request.answer_ids}
    async for output in client.generate(request):
        answers[output.request_id] += output.token_ids
    return answers


@pytest.mark.parametrize("max_num_seqs", [1, 2, 8])
def test_all_answers_come_over_one_stream_each_as_alone(tmp_path, max_num_seqs):
    async def scenario():
        async with engine_and_client(tmp_path, max_num_seqs=max_num_seqs) as (engine, client):
            assert await answers_of(client, REQUEST) == expected(REQUEST)
            assert engine.stats().num_images_encoded == 1

    asyncio.run(scenario())


def test_every_answer_runs_or_waits_from_the_first_step_on(tmp_path):
    """Answers whose prompt another one computes were told by neither figure."""
    is_held, may_go_on = threading.Event(), threading.Event()
    told = []

    def hold_first(batch):
        if not is_held.is_set():
            is_held.set()
            assert may_go_on.wait(DEADLINE_S)

    async def scenario():
        async with engine_and_client(tmp_path, hold_first, max_num_seqs=2) as (engine, client):
            answers = asyncio.create_task(answers_of(client, REQUEST))
            await asyncio.to_thread(is_held.wait, DEADLINE_S)
            told.append((engine.stats().num_running, engine.stats().num_waiting))
            may_go_on.set()
            await answers
            told.append((engine.stats().num_running, engine.stats().num_waiting))

    asyncio.run(scenario())
    assert told == [(1, 3), (0, 0)]


@pytest.mark.parametrize("left", ["a", "c"])
def test_a_choice_that_is_left_ends_alone_and_early(tmp_path, left):
    longer = replace(REQUEST, max_tokens=40)
    num_computed: dict[str, int] = {}

    def count(batch):
        for one in batch.sequences:
            num_computed[one.request_id.partition("/")[2]] = one.start + len(one.token_ids)

    async def scenario():
        async with engine_and_client(tmp_path, count, max_num_seqs=8) as (_, client):
            answers: dict[str, list[int]] = {name: [] for name in "abcd"}
            ended = set()
            async with contextlib.aclosing(client.generate(longer)) as outputs:
                async for output in outputs:
                    answers[output.request_id] += output.token_ids
                    if output.request_id == left:
                        client.leave(left)
                    if output.request_id == left or output.finish_reason:
                        ended.add(output.request_id)
                    if len(ended) == len(answers):
                        break
            whole = expected(longer)
            assert answers[left] == whole[left][: len(answers[left])]
            for name in {*"abcd"} - {left}:
                assert answers[name] == whole[name]
                assert num_computed[name] == 10 + 39
            assert num_computed[left] < 10 + 39, "the engine was not told"

    asyncio.run(scenario())


def test_what_had_come_already_of_a_choice_that_is_left_is_dropped(tmp_path):
    """One step brings the tokens of all choices; the caller takes one after the other."""

    async def scenario():
        async with engine_and_client(tmp_path, max_num_seqs=8) as (_, client):
            has_left = False
            num_open = 3
            async with contextlib.aclosing(client.generate(REQUEST)) as outputs:
                async for output in outputs:
                    assert not has_left or output.request_id != "c"
                    if output.request_id == "b" and not has_left:
                        client.leave("c")
                        has_left = True
                    num_open -= output.finish_reason is not None
                    if not num_open:
                        break

    asyncio.run(scenario())


@pytest.mark.parametrize("failing_step", [1, 2, 4])
def test_a_failed_choice_fails_the_request_and_the_others_are_aborted(tmp_path, failing_step):
    """Two places, so that a failed step has one or two of the four choices in it."""
    num_steps = 0

    def fail_one(batch):
        nonlocal num_steps
        num_steps += 1
        if num_steps == failing_step:
            raise RuntimeError("out of memory")

    async def scenario():
        async with engine_and_client(tmp_path, fail_one, max_num_seqs=2) as (_, client):
            with pytest.raises(EngineInternalError):
                await answers_of(client, REQUEST)
            again = replace(REQUEST, request_id="again", choice_ids=["and again"])
            assert await answers_of(client, again) == expected(again)

    asyncio.run(scenario())


def test_a_caller_that_leaves_aborts_every_choice(tmp_path):
    async def scenario():
        longer = replace(REQUEST, max_tokens=20)
        async with (
            engine_and_client(tmp_path, max_num_seqs=2) as (_, client),
            contextlib.aclosing(client.generate(longer)) as outputs,
        ):
            await anext(outputs)

    asyncio.run(scenario())
