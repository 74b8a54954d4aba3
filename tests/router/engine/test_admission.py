"""Overload: what is refused, how soon, and that nothing of it stays.

In one process, where a step can be held by a gate and the queue's own counts be read;
`tests/whole/test_server_faults.py` asks the same of whole servers.
"""

import asyncio
import time

import httpx2
import pytest
from support.engine_side import engine_at
from support.fake_runner import FakeRunner
from support.http_to_engine import body_of, server_at, until_free, until_ready
from support.invariants import (
    CHAT,
    COMPLETIONS,
    GENERATION_ROUTES,
    SLACK,
    STACK_ROUTES,
    TEXT_ROUTES,
)
from support.polling import until
from support.step_gate import StepGate

from vlmserve.router.config import EngineConfig
from vlmserve.router.engine.engine import Engine
from vlmserve.router.messages import AddRequest, FromEngine, OwnerPolicy, RequestFailed
from vlmserve.router.scheduler.request_queue import RequestQueue
from vlmserve.router.scheduler.sequence import Sequence
from vlmserve.router.scheduler.throughput import WaitEstimator

REFUSAL_S = 0.05


LIMITS = {
    "count": {"max_queue_requests": 1},
    "tokens": {"max_queue_tokens": 12},
    "bytes": {"max_queue_bytes": 30},
}


@pytest.mark.parametrize("limit", LIMITS)
def test_row_31_a_full_queue_is_a_429_with_retry_after_at_once_while_a_step_runs(tmp_path, limit):
    """On every route, streamed or not; what waited and ran is answered all the same."""

    async def scenario():
        gate = StepGate()
        runner, path = FakeRunner(before_step=gate), tmp_path / "engine.sock"
        options = {"max_num_seqs": 1} | LIMITS[limit]
        async with engine_at(path, runner, **options) as engine, server_at(path) as client:
            await until_ready(client)
            images = ["picture"] if limit == "bytes" else []
            routes = GENERATION_ROUTES if limit == "bytes" else TEXT_ROUTES
            first = routes[0]
            taken = []
            for count in (1, 2):
                call = client.post(first, json=body_of(first, images=images))
                taken.append(asyncio.create_task(call))
                await until(lambda count=count: num_open(engine) == count)
            for route in routes:
                for stream in (False, True):
                    body = body_of(route, images=images, stream=stream)
                    began = time.monotonic()
                    answer = await client.post(route, json=body)
                    assert time.monotonic() - began < REFUSAL_S * SLACK
                    assert answer.status_code == 429, answer.text
                    assert answer.json()["error"]["type"] == "rate_limit_error"
                    assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert num_open(engine) == 2
            gate.open()
            for one in await asyncio.gather(*taken):
                assert one.status_code == 200
            await until_free(engine)
            scheduler = engine.scheduler.snapshot()
            assert scheduler.waiting_tokens == scheduler.waiting_bytes == 0

    asyncio.run(scenario())


def num_open(engine: Engine) -> int:
    return engine.stats().num_running + engine.stats().num_waiting


def test_row_31_a_wait_that_would_be_too_long_is_a_429(tmp_path):
    """The expected wait follows how long requests ran; a free place is always taken."""

    async def scenario():
        runner, path = FakeRunner(step_seconds=0.02), tmp_path / "engine.sock"
        options = {"max_num_seqs": 2, "max_queue_wait_s": 0.4}
        async with engine_at(path, runner, **options) as engine, server_at(path) as client:
            await until_ready(client)
            route = GENERATION_ROUTES[0]
            # Ten tokens a request take 0.2 s: one comes free every 0.1 s, if not later.
            body = body_of(route, max_tokens=10, ignore_eos=True)
            for _ in range(3):
                pair = await asyncio.gather(*(client.post(route, json=body) for _ in range(2)))
                assert [one.status_code for one in pair] == [200, 200]
            answers = await asyncio.gather(*(client.post(route, json=body) for _ in range(30)))
            statuses = [one.status_code for one in answers]
            assert set(statuses) == {200, 429}
            assert 2 <= statuses.count(200) <= 6
            refused = next(one for one in answers if one.status_code == 429)
            assert "--max-queue-wait" in refused.json()["message"]
            assert int(refused.headers["retry-after"]) >= 1
            await until_free(engine)
            assert (await client.post(route, json=body)).status_code == 200

    asyncio.run(scenario())


@pytest.mark.parametrize("have_started", [False, True])
def test_row_31_the_wait_follows_how_long_the_last_requests_ran(have_started):
    """Two places, 8 s a request: one comes free every 4 s, and 10 s may be waited."""
    refused: dict[str, float | None] = {}

    def receive(worker_id: int, message: FromEngine) -> None:
        assert isinstance(message, RequestFailed)
        refused[message.request_id] = message.retry_after_s

    config = EngineConfig(model="fake", socket_path="", max_num_seqs=2, max_queue_wait_s=10.0)
    estimator = WaitEstimator()
    engine = Engine(FakeRunner(), config, receive, wait_estimator=estimator)
    for _ in range(4):
        estimator.record_run(8.0)
    for name in "ab":
        engine.add(1, AddRequest(request_id=name, prompt_token_ids=[1], max_tokens=9))
    if have_started:
        assert engine.scheduler.schedule() is not None
        assert engine.stats().num_running == 2
    for name in "cdef":
        engine.add(1, AddRequest(request_id=name, prompt_token_ids=[1], max_tokens=9))
    assert refused == {"e": 2.0, "f": 2.0}, "the third would wait for 12 s"


def test_a_heartbeat_looks_at_no_waiting_request(monkeypatch):
    """Each sorted the whole queue, up to 4,096 requests, while a step computed."""
    config = EngineConfig(model="fake", socket_path="", max_num_seqs=2)
    engine = Engine(FakeRunner(), config, lambda worker_id, message: None)
    for number in range(200):
        request = AddRequest(request_id=str(number), prompt_token_ids=[1], max_tokens=9)
        engine.add(1, request)
    assert engine.scheduler.schedule() is not None
    looked_at = []
    monkeypatch.setattr(Sequence, "rank", property(looked_at.append))
    monkeypatch.setattr(RequestQueue, "__iter__", lambda queue: looked_at.append(queue) or iter(()))
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, looked_at) == (2, 198, [])


@pytest.mark.parametrize("route", [CHAT, STACK_ROUTES[0], COMPLETIONS])
def test_row_32_counters_are_back_whatever_becomes_of_the_requests(tmp_path, route):
    """Answered, refused, past their time, left, and failed in a step: nothing stays counted."""

    async def scenario():
        fails = [False]

        def maybe_fail(batch):
            if fails[0]:
                raise RuntimeError("secret")

        runner = FakeRunner(step_seconds=0.005, before_step=maybe_fail)
        path = tmp_path / "engine.sock"
        options = {"max_num_seqs": 2, "max_queue_requests": 3}
        async with engine_at(path, runner, **options) as engine, server_at(path) as client:
            await until_ready(client)
            calls = [
                asyncio.create_task(
                    client.post(route, json=body_of(route, max_tokens=60, stream=bool(i % 2)))
                )
                for i in range(12)
            ]
            await until(lambda: engine.stats().num_running == 2)
            await until(lambda: sum(one.done() for one in calls) >= 7)
            next(one for one in calls if not one.done()).cancel()
            await until(lambda: engine.stats().num_steps > 10)
            fails[0] = True
            await until(lambda: num_open(engine) == 0)
            fails[0] = False
            answers = await asyncio.gather(*calls, return_exceptions=True)
            statuses = {one.status_code for one in answers if isinstance(one, httpx2.Response)}
            assert statuses <= {200, 429, 500}
            assert 429 in statuses
            if "timeout_s" in body_timeout(route):
                late = await client.post(
                    route, json=body_of(route, max_tokens=600, timeout_s=0.1, ignore_eos=True)
                )
                assert late.status_code == 504
                assert late.json()["error"]["code"] == "timeout"
            await until_free(engine)
            scheduler = engine.scheduler.snapshot()
            assert not scheduler.waiting
            assert scheduler.waiting_tokens == scheduler.waiting_bytes == 0
            assert (await client.post(route, json=body_of(route))).status_code == 200

    asyncio.run(scenario())


def body_timeout(route):
    """Fields by which a request of this route may ask for less time."""
    return {"timeout_s"} if route.endswith("completions") else set()


def engine_with(received: dict[str, RequestFailed], **options) -> Engine:
    """An engine that is not run; keeps why requests failed."""

    def receive(worker_id: int, message: FromEngine) -> None:
        if isinstance(message, RequestFailed):
            received[message.request_id] = message

    config = EngineConfig(model="fake", socket_path="", **options)
    return Engine(FakeRunner(), config, receive)


def test_an_owner_has_at_most_its_answers_at_once_over_all_workers():
    failed: dict[str, RequestFailed] = {}
    engine = engine_with(failed)

    def add(worker_id: int, name: str, *choice_ids: str, owner="limited", limit=3) -> None:
        policy = OwnerPolicy(max_concurrent=limit)
        engine.add(
            worker_id,
            AddRequest(
                request_id=name, prompt_token_ids=[1], max_tokens=9,
                choice_ids=list(choice_ids), owner=owner, policy=policy,
            ),
        )  # fmt: skip

    add(1, "a")
    add(2, "b", "b2")
    add(1, "c")
    add(1, "other", owner="other")
    add(2, "d", "d2", "d3", "d4")
    assert {name: one.kind for name, one in failed.items()} == {"c": "too_many"} | dict.fromkeys(
        ["d", "d2", "d3", "d4"], "invalid"
    )
    assert "may have 3 at once" in failed["c"].message
    engine.abort(2, ["b2"])
    failed.clear()
    add(1, "e")
    assert not failed
    engine.drop_worker(2)
    add(1, "f")
    add(1, "g")
    assert list(failed) == ["g"], "what a lost worker had counts no longer"
    engine.drop_worker(1)
    assert len(engine.scheduler.owners) == 0


def test_each_step_reports_the_full_owners_and_no_other():
    engine = engine_with({}, max_num_seqs=2, max_queue_requests=4)
    for number in range(6):
        for owner in "ab":
            name = f"{owner}{number}"
            request = AddRequest(request_id=name, prompt_token_ids=[1], max_tokens=9, owner=owner)
            if owner == "a" or number < 1:
                engine.add(1, request)
        if number == 1:
            assert engine.scheduler.schedule() is not None
    rejections = engine._gate.rejections()
    assert [one.owner for one in rejections] == ["a"]
    assert "--max-queue-requests" in rejections[0].message


def test_a_long_line_of_one_owner_is_no_long_wait_for_another():
    failed: dict[str, RequestFailed] = {}
    engine = engine_with(failed, max_num_seqs=1, max_queue_wait_s=10.0)
    engine.add(1, AddRequest(request_id="running", prompt_token_ids=[1], max_tokens=9, owner="a"))
    assert engine.scheduler.schedule() is not None
    for number in range(50):
        request = AddRequest(request_id=f"a{number}", prompt_token_ids=[1], max_tokens=9, owner="a")
        engine.add(1, request)
    for _ in range(4):
        engine._wait_estimator.record_run(4.0)
    engine.add(1, AddRequest(request_id="more", prompt_token_ids=[1], max_tokens=9, owner="a"))
    engine.add(1, AddRequest(request_id="b", prompt_token_ids=[1], max_tokens=9, owner="b"))
    assert list(failed) == ["more"]
    assert "--max-queue-wait" in failed["more"].message
