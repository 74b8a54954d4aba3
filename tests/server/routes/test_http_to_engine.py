"""The HTTP side over a real socket to a real engine, whose runner only hashes."""

import asyncio
import json

import pytest
from support.engine_side import engine_at
from support.fake_runner import FakeRunner, fake_info
from support.http_to_engine import body, server_at, until_free, until_ready, until_running
from support.invariants import CHAT
from support.polling import until

from vlmserve.models.batch import PoolSizes


def test_mixed_requests_at_once_get_the_answers_they_get_alone(tmp_path):
    async def scenario():
        path = tmp_path / "engine.sock"
        async with engine_at(path, FakeRunner()) as engine, server_at(path) as client:
            await until_ready(client)
            bodies = [body(f"picture {i}?", images=i % 3) for i in range(12)]
            alone = [(await client.post(CHAT, json=one)).json() for one in bodies]
            together = await asyncio.gather(*(client.post(CHAT, json=one) for one in bodies))
            await until_free(engine)
        for one, other in zip(alone, together, strict=True):
            other = other.json()
            assert other["choices"] == one["choices"]
            assert other["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]
            assert other["usage"]["completion_tokens"] == 8

    asyncio.run(scenario())


def test_a_full_queue_is_a_429_and_comes_free_again(tmp_path):
    async def scenario():
        path = tmp_path / "engine.sock"
        options = {"max_num_seqs": 1, "max_queue_requests": 1}
        runner = FakeRunner(step_seconds=0.02)
        async with engine_at(path, runner, **options) as engine, server_at(path) as client:
            await until_ready(client)
            calls = (client.post(CHAT, json=body(stream=bool(i % 2))) for i in range(8))
            answers = await asyncio.gather(*calls)
            statuses = {answer.status_code for answer in answers}
            assert statuses == {200, 429}
            for answer in answers:
                if answer.status_code == 429:
                    assert int(answer.headers["retry-after"]) >= 1
                    assert answer.json()["error"]["type"] == "rate_limit_error"
            await until_free(engine)
            assert (await client.post(CHAT, json=body())).status_code == 200

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("place", ["queue", "prompt", "answer"])
def test_a_request_past_its_time_is_freed_wherever_it_is(tmp_path, place, stream):
    """Held up by the request before it, by its prompt's chunks or by its answer's tokens."""
    text = {"queue": "?", "prompt": "What? " * 150, "answer": "?"}[place]
    late = body(text, max_tokens=100, timeout_s=1.0, stream=stream)
    options = {"max_num_seqs": 1, "max_num_batched_tokens": 4}

    async def scenario():
        path = tmp_path / "engine.sock"
        runner = FakeRunner(step_seconds=0.05)
        async with engine_at(path, runner, **options) as engine, server_at(path) as client:
            await until_ready(client)
            before = []
            if place == "queue":
                before = [asyncio.create_task(client.post(CHAT, json=body(max_tokens=60)))]
                await until_running(engine)
            answer = await client.post(CHAT, json=late)
            assert '"code":"timeout"' in answer.text
            if stream and place == "answer":
                assert answer.text.endswith("data: [DONE]\n\n")
            if not stream:
                assert answer.status_code == 504
            assert [one.status_code for one in await asyncio.gather(*before)] == [200] * len(before)
            await until_free(engine)
            assert "request_failure_total 1.0" in (await client.get("/metrics")).text

    asyncio.run(scenario())


def test_what_the_pools_can_never_hold_is_a_400(tmp_path):
    async def scenario():
        path = tmp_path / "engine.sock"
        runner = FakeRunner(fake_info(PoolSizes(64, 2, 16)))
        async with engine_at(path, runner), server_at(path) as client:
            await until_ready(client)
            for stream in (False, True):
                answer = await client.post(CHAT, json=body(images=2, stream=stream))
                assert answer.status_code == 400

    asyncio.run(scenario())


def test_clients_that_leave_free_everything(tmp_path):
    async def scenario():
        path = tmp_path / "engine.sock"
        runner = FakeRunner(step_seconds=0.01)
        async with engine_at(path, runner, max_num_seqs=2) as engine, server_at(path) as client:
            await until_ready(client)
            calls = [
                asyncio.create_task(
                    client.post(CHAT, json=body(images=1, stream=bool(i % 2), max_tokens=900))
                )
                for i in range(6)
            ]
            await until(lambda: engine.stats().num_running + engine.stats().num_waiting == 6)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            await until_free(engine)
            assert runner.num_steps < 900

    asyncio.run(scenario())


def test_a_stop_string_frees_the_request_in_the_engine(tmp_path):
    async def scenario():
        path = tmp_path / "engine.sock"
        runner = FakeRunner(step_seconds=0.005)
        async with engine_at(path, runner) as engine, server_at(path) as client:
            await until_ready(client)
            text = (await client.post(CHAT, json=body(max_tokens=40))).json()
            text = text["choices"][0]["message"]["content"]
            stop = text[len(text) // 2 :][:3]
            answer = await client.post(CHAT, json=body(max_tokens=900, stop=stop))
            choice = answer.json()["choices"][0]
            assert choice["message"]["content"] == text[: text.index(stop)]
            assert choice["stop_reason"] == stop
            await until_free(engine)
            assert runner.num_steps < 400

    asyncio.run(scenario())


def test_an_engine_that_goes_away_ends_streams_and_its_successor_is_found(tmp_path):
    async def scenario():
        path = tmp_path / "engine.sock"
        async with server_at(path) as client:
            assert (await client.post(CHAT, json=body())).status_code == 503
            runner = FakeRunner(step_seconds=0.02)
            async with engine_at(path, runner) as engine:
                await until_ready(client)
                streamed = client.post(CHAT, json=body(max_tokens=900, stream=True))
                streamed = asyncio.create_task(streamed)
                plain = asyncio.create_task(client.post(CHAT, json=body(max_tokens=900)))
                await until(lambda: engine.stats().num_running == 2 and runner.num_steps > 20)
            *_, error, done = (await streamed).text.removesuffix("\n\n").split("\n\n")
            assert done == "data: [DONE]"
            assert list(json.loads(error.removeprefix("data: "))) == ["error"]
            assert (await plain).status_code == 503
            await until_ready(client, 503)
            async with engine_at(path, FakeRunner()):
                await until_ready(client)
                assert (await client.post(CHAT, json=body())).status_code == 200

    asyncio.run(scenario())


def test_a_failed_step_is_a_500_and_the_next_request_is_served(tmp_path):
    async def scenario():
        def fail_once(batch):
            if runner.num_steps == 0 and not failed:
                failed.append(batch)
                raise RuntimeError("secret")

        failed = []
        runner = FakeRunner(before_step=fail_once)
        path = tmp_path / "engine.sock"
        async with engine_at(path, runner) as engine, server_at(path) as client:
            await until_ready(client)
            broken = await client.post(CHAT, json=body(images=1))
            assert broken.status_code == 500
            assert "secret" not in broken.text
            await until_free(engine)
            assert (await client.post(CHAT, json=body(images=1))).status_code == 200

    asyncio.run(scenario())
