"""The engine computes a newcomer's prompt inside the running step. No time is measured."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest
from support.engine_rig import engine_of, request_of, tokens_of
from support.fake_runner import FakeRunner, expected_token_ids
from support.polling import FAR_S, until, wait_until

from vlmserve.models.batch import StepBatch
from vlmserve.router.errors import EngineInternalError


class PausedRunner(FakeRunner):
    """Its step waits, when told to, before its tokens are written or right after.

    batches: the names of each step's requests, in the order in which the steps ended.
    """

    def __init__(self) -> None:
        super().__init__()
        self.may_go_on, self.has_paused = threading.Event(), threading.Event()
        self.pauses_before = self.pauses_after = False
        self.before_second_layer: Callable[[], object] | None = None
        self.fails: set[str] = set()
        self.batches: list[list[str]] = []

    def _pause(self) -> None:
        self.has_paused.set()
        assert self.may_go_on.wait(FAR_S)

    def call_between_layers(self, callback) -> bool:
        def paused() -> None:
            if self.pauses_before:
                self.pauses_before = False
                self._pause()
            wait, self.before_second_layer = self.before_second_layer, None
            callback()
            if wait is not None:
                wait()
                callback()

        return super().call_between_layers(paused)

    def execute(self, batch: StepBatch, *on_launch) -> object:
        result = super().execute(batch, *on_launch)
        names = [row.request_id.split("/")[1] for row in batch.sequences]
        if self.pauses_after and "flood 0" in names:
            self.pauses_after = False
            self._pause()
        if self.fails & set(names):
            raise RuntimeError("this step fails")
        self.batches.append(names)
        return result


async def flooded(rig, num_requests=8):
    """A client whose requests fill every step; returns its tasks when they run."""
    client = await rig.connect()
    requests = [request_of(f"flood {n}", max_tokens=300, owner="a") for n in range(num_requests)]
    tasks = [asyncio.create_task(tokens_of(client, one)) for one in requests]
    await until(lambda: rig.engine.scheduler.num_running == num_requests)
    await until(lambda: rig.engine.snapshot().num_steps > 5)
    return client, requests, tasks


async def ask_in_paused_step(rig, client, request, when="before") -> asyncio.Task:
    """Pause the next step of eight answers, and send a request that runs beside them then."""
    setattr(rig.runner, f"pauses_{when}", True)
    await until(rig.runner.has_paused.is_set)
    answer = asyncio.create_task(tokens_of(client, request))
    await until(lambda: rig.engine.scheduler.num_running == 9)
    return answer


def pretend_times(rig) -> None:
    """As if a step of one prompt were measured as much shorter than one of all answers."""
    times = rig.engine.scheduler._step_times
    times.is_shorter = lambda num_tokens, num_more: num_tokens < num_more / 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_newcomers_token_comes_while_the_step_is_computed_and_at_the_latest_next(tmp_path, when):
    """before: it is inserted. after: the step had started its last layer, so it is the next."""

    async def scenario() -> None:
        runner = PausedRunner()
        async with engine_of(tmp_path, runner, max_num_seqs=8) as rig:
            pretend_times(rig)
            client, requests, tasks = await flooded(rig)
            new = request_of("new", max_tokens=5, owner="b")
            answer = await ask_in_paused_step(rig, client, new, when)
            num_before = len(runner.batches)
            runner.may_go_on.set()
            assert await answer == expected_token_ids(new)
            for task, request in zip(tasks, requests, strict=True):
                assert await task == expected_token_ids(request)
            names = runner.batches[num_before : num_before + 3]
            first = 0 if when == "before" else 1
            assert names[first] == ["new"]
            assert names[1 - first] == [one.request_id for one in requests]
            assert "new" in names[2]
            assert len(names[2]) == 8, "an answer of the flood gave it its place"

    asyncio.run(scenario())


def test_a_newcomer_that_comes_while_another_is_inserted_is_inserted_into_the_same_step(tmp_path):
    """It waited for the whole step: a step had at most one inside."""

    async def scenario() -> None:
        runner = PausedRunner()
        async with engine_of(tmp_path, runner, max_num_seqs=8) as rig:
            pretend_times(rig)
            client, requests, tasks = await flooded(rig)
            scheduler, insertions = rig.engine.scheduler, rig.engine._insertions
            # the eight tokens of the step allow two prompts of two
            scheduler._step_times.is_shorter = lambda num_tokens, num_more: True
            runner.before_second_layer = lambda: wait_until(
                lambda: insertions._current is not None and not insertions._current.is_taken, FAR_S
            )
            news = [request_of(f"new {n}", (1, 2), 1, owner=f"b {n}") for n in range(2)]
            runner.pauses_before = True
            await until(runner.has_paused.is_set)
            answers = [asyncio.create_task(tokens_of(client, one)) for one in news]
            await until(lambda: scheduler.num_running == 9 and len(rig.engine._open) == 10)
            num_before = len(runner.batches)
            runner.may_go_on.set()
            for answer, one in zip(answers, news, strict=True):
                assert await answer == expected_token_ids(one)
            for task, request in zip(tasks, requests, strict=True):
                assert await task == expected_token_ids(request)
            # the outer step is recorded when it ends, after the answers inside it
            inside = [["new 0"], ["new 1"], [one.request_id for one in requests]]
            assert runner.batches[num_before : num_before + 3] == inside

    asyncio.run(scenario())


def test_a_newcomer_that_was_not_inserted_on_arrival_is_when_the_next_step_starts(
    tmp_path,
):
    """Only an arrival looked for one: it waited through a step of a flood's prompts."""

    async def scenario() -> None:
        runner = PausedRunner()
        async with engine_of(tmp_path, runner, max_num_seqs=8) as rig:
            client, requests, tasks = await flooded(rig)
            scheduler = rig.engine.scheduler
            more = [request_of(f"flood {n}", max_tokens=5, owner="a") for n in range(8, 12)]
            tasks += [asyncio.create_task(tokens_of(client, one)) for one in more]
            await until(lambda: len(rig.engine._open) == 12)
            scheduler._step_times.is_shorter = lambda num_tokens, num_more: False
            runner.pauses_before = True
            await until(runner.has_paused.is_set)
            new = request_of("new", max_tokens=1, owner="b")
            answer = asyncio.create_task(tokens_of(client, new))
            await until(lambda: len(rig.engine._open) == 13)
            assert scheduler.num_running == 8
            scheduler.owners.charge("b", 4)  # another request of the flood is next in the queue
            scheduler._step_times.is_shorter = lambda num_tokens, num_more: True
            num_before = len(runner.batches)
            runner.may_go_on.set()
            assert await answer == expected_token_ids(new)
            flood = [one.request_id for one in requests]
            assert runner.batches[num_before : num_before + 3] == [flood, ["new"], flood]
            for task, request in zip(tasks, requests + more, strict=True):
                assert await task == expected_token_ids(request)

    asyncio.run(scenario())


def test_an_inserted_step_that_fails_ends_its_request_alone(tmp_path):
    async def scenario() -> None:
        runner = PausedRunner()
        runner.fails = {"new"}
        async with engine_of(tmp_path, runner, max_num_seqs=8) as rig:
            pretend_times(rig)
            client, requests, tasks = await flooded(rig)
            answer = await ask_in_paused_step(rig, client, request_of("new", owner="b"))
            runner.may_go_on.set()
            with pytest.raises(EngineInternalError):
                await answer
            for task, request in zip(tasks, requests, strict=True):
                assert await task == expected_token_ids(request)

    asyncio.run(scenario())


def test_an_engine_that_stops_waits_for_no_inserted_step(tmp_path):
    async def scenario() -> None:
        runner = PausedRunner()
        async with engine_of(tmp_path, runner, max_num_seqs=8) as rig:
            pretend_times(rig)
            client, _, tasks = await flooded(rig)
            answer = await ask_in_paused_step(rig, client, request_of("new", owner="b"))
            for task in [*tasks, answer]:
                task.cancel()
            await asyncio.gather(*tasks, answer, return_exceptions=True)
            runner.may_go_on.set()

    asyncio.run(scenario())
