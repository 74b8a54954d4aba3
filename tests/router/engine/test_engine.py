"""The engine over its real Unix socket, with a runner that hashes instead of computing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat

import pytest
from support.engine_rig import engine_of, image_request, request_of, tokens_of
from support.fake_runner import FakeRunner, expected_token_ids, fake_image, fake_info
from support.polling import until
from support.step_gate import StepGate

from vlmserve.models.batch import ImageSpan, OnLaunch, PoolSizes, StepBatch, StepResult
from vlmserve.router.client.engine_client import EngineClient
from vlmserve.router.config import EngineConfig
from vlmserve.router.engine.engine import Engine
from vlmserve.router.engine.server import EngineServer, SocketPathError
from vlmserve.router.errors import (
    EngineDeadError,
    EngineInternalError,
    InvalidRequestError,
    QueueFullError,
)
from vlmserve.router.messages import AbortRequests, AddRequest, RequestFailed
from vlmserve.router.processes import wire

DEADLINE_S = 120


async def until_refused(reader: asyncio.StreamReader, request_id: str) -> None:
    """Read what the engine sends up to the refusal of this request."""
    while True:
        message = await wire.read_message(reader, wire.from_engine_decoder)
        if isinstance(message, RequestFailed) and message.request_id == request_id:
            return


def test_sixty_four_requests_over_two_workers_answer_as_if_alone(tmp_path):
    async def scenario() -> None:
        runner = FakeRunner(fake_info(PoolSizes(24, 24, 4)))
        async with engine_of(tmp_path, runner, max_num_batched_tokens=48, max_num_seqs=16) as rig:
            workers = [await rig.connect(), await rig.connect()]
            requests = [mixed_request(number) for number in range(64)]
            answers = await asyncio.gather(
                *(tokens_of(workers[n % 2], request) for n, request in enumerate(requests))
            )
            assert answers == [expected_token_ids(request) for request in requests]
            assert rig.engine.stats().num_preemptions > 0, "the pool was meant to run out"
            assert runner.max_batched_sequences > 4

    asyncio.run(scenario())


def mixed_request(number: int) -> AddRequest:
    images = [fake_image(f"picture {number % 5}", 1 + number % 3)] * (number % 3)
    return request_of(
        f"request {number}",
        prompt=range(number, number + 5 + number % 11),
        max_tokens=5 + number % 17,
        images=images,
        spans=[ImageSpan(2 + index) for index in range(len(images))],
    )


def test_a_third_of_the_requests_cancelled_midway_leave_nothing_behind(tmp_path):
    async def scenario() -> None:
        runner = FakeRunner(fake_info(PoolSizes(80, 8, 4)))
        async with engine_of(tmp_path, runner, max_num_seqs=16) as rig:
            client = await rig.connect()
            tasks = [
                asyncio.create_task(tokens_of(client, mixed_request(number)))
                for number in range(64)
            ]
            for number in range(0, 64, 3):
                before = runner.num_steps
                await until(lambda n=before: runner.num_steps > n or not rig.engine.snapshot().open)
                tasks[number].cancel()
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            for number, answer in enumerate(answers):
                if number % 3 or not isinstance(answer, asyncio.CancelledError):
                    assert answer == expected_token_ids(mixed_request(number))
            assert any(isinstance(answer, asyncio.CancelledError) for answer in answers)
            assert client.num_open_requests == 0
            await rig.settled()

    asyncio.run(scenario())


def test_a_closed_iterator_frees_its_request_right_after_the_running_step(tmp_path):
    gate = StepGate(1)

    async def scenario() -> None:
        runner = FakeRunner(before_step=gate)
        async with engine_of(tmp_path, runner) as rig:
            client = await rig.connect()
            outputs = client.generate(image_request(max_tokens=500))
            await anext(outputs)
            await until(lambda: gate.is_holding)
            assert rig.engine.stats().image_blocks_used == 2
            await outputs.aclose()
            # The abort arrives while the step runs.
            await until(lambda: rig.engine.snapshot().num_aborting == 1)
            gate.open()
            await rig.settled()
            assert gate.num_steps == 2

    asyncio.run(scenario())


def test_a_waiting_request_is_aborted_without_a_step(tmp_path):
    gate = StepGate()

    async def scenario() -> None:
        async with engine_of(tmp_path, FakeRunner(before_step=gate), max_num_seqs=1) as rig:
            client = await rig.connect()
            first = asyncio.create_task(tokens_of(client, request_of("first")))
            await until(lambda: gate.is_holding)
            second = asyncio.create_task(tokens_of(client, request_of("second")))
            await until(lambda: rig.engine.stats().num_waiting == 1)
            second.cancel()
            await until(lambda: rig.engine.stats().num_waiting == 0)
            gate.open()
            assert await first == expected_token_ids(request_of("first"))

    asyncio.run(scenario())


def test_an_exception_in_a_step_ends_its_requests_and_no_others(tmp_path):
    gate = StepGate()

    def fail_first(batch: StepBatch) -> None:
        gate(batch)
        if gate.num_steps == 1:
            raise RuntimeError("out of memory at /secret/path")

    async def scenario() -> None:
        runner = FakeRunner(before_step=fail_first)
        async with engine_of(tmp_path, runner, max_num_seqs=2) as rig:
            client = await rig.connect()
            # The first step holds "a" alone: the rest arrives while it runs.
            requests = [image_request(name, max_tokens=6) for name in "abcd"]
            tasks = [asyncio.create_task(tokens_of(client, requests[0]))]
            await until(lambda: gate.is_holding)
            tasks += [asyncio.create_task(tokens_of(client, one)) for one in requests[1:]]
            await until(lambda: rig.engine.stats().num_waiting == 3)
            gate.open()
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(answers[0], EngineInternalError)
            assert "secret" not in str(answers[0])
            assert answers[1:] == [expected_token_ids(one) for one in requests[1:]]

    asyncio.run(scenario())


@pytest.mark.parametrize("forgotten", ["token_ids", "prompt_logprobs"])
def test_a_runner_that_forgets_a_sequence_fails_the_step_and_not_the_engine(tmp_path, forgotten):
    class Forgetful(FakeRunner):
        def execute(self, batch: StepBatch, *on_launch: OnLaunch) -> StepResult:
            result = super().execute(batch, *on_launch)
            if self.num_steps == 1:
                setattr(result, forgotten, {})
            return result

    async def scenario() -> None:
        async with asyncio.timeout(DEADLINE_S), engine_of(tmp_path, Forgetful()) as rig:
            client = await rig.connect()
            with pytest.raises(EngineInternalError):
                await tokens_of(client, request_of("a", num_prompt_logprobs=0))
            assert await tokens_of(client, request_of("b")) == expected_token_ids(request_of("b"))

    asyncio.run(scenario())


def test_a_worker_that_vanishes_takes_its_requests_along_and_no_others(tmp_path):
    gate = StepGate(2)

    async def scenario() -> None:
        runner = FakeRunner(before_step=gate)
        async with engine_of(tmp_path, runner, max_num_seqs=2) as rig:
            leaving, staying = await rig.connect(), await rig.connect()
            left = [
                asyncio.create_task(tokens_of(leaving, image_request(name, max_tokens=400)))
                for name in "ab"
            ]
            await until(lambda: gate.is_holding)
            left.append(asyncio.create_task(tokens_of(leaving, image_request("c"))))
            stays = asyncio.create_task(tokens_of(staying, image_request("a")))
            await until(lambda: rig.engine.stats().num_waiting == 2)
            await leaving.close()
            await until(lambda: rig.server.num_workers == 1)
            await until(lambda: rig.engine.stats().num_waiting == 1)
            gate.open()
            assert await stays == expected_token_ids(image_request("a"))
            for answer in await asyncio.gather(*left, return_exceptions=True):
                assert isinstance(answer, EngineDeadError)

    asyncio.run(scenario())


def test_a_full_queue_refuses_at_once_and_serves_again_later(tmp_path):
    gate = StepGate()

    async def scenario() -> None:
        runner = FakeRunner(before_step=gate)
        async with engine_of(tmp_path, runner, max_num_seqs=1, max_queue_requests=1) as rig:
            client = await rig.connect()
            tasks = [asyncio.create_task(tokens_of(client, request_of("running")))]
            await until(lambda: gate.is_holding)
            tasks.append(asyncio.create_task(tokens_of(client, request_of("waiting"))))
            await until(lambda: rig.engine.stats().num_waiting == 1)
            with pytest.raises(QueueFullError) as rejection:
                await tokens_of(client, request_of("refused"))
            assert rejection.value.retry_after_s > 0
            gate.open()
            await asyncio.gather(*tasks)
            assert len(await tokens_of(client, request_of("refused"))) == 4

    asyncio.run(scenario())


def test_a_step_tells_workers_that_have_something_open_that_a_newcomer_would_be_refused(
    tmp_path, monkeypatch
):
    """And the next that it would not; a better priority must ask the engine itself."""
    # whatever holds this test up
    monkeypatch.setattr("vlmserve.router.client.engine_client.REJECTION_S", 1e9)

    async def scenario() -> None:
        runner = FakeRunner(step_seconds=0.01)
        async with engine_of(tmp_path, runner, max_num_seqs=1, max_queue_requests=1) as rig:
            client, idle = await rig.connect(), await rig.connect()
            running = asyncio.create_task(tokens_of(client, request_of("r", max_tokens=5_000)))
            await until(lambda: rig.engine.stats().num_running == 1)
            waiting = asyncio.create_task(tokens_of(client, request_of("w", max_tokens=5_000)))
            await until(lambda: client.rejection("", 0) is not None)
            rejection = client.rejection("", 1)
            assert isinstance(rejection, QueueFullError)
            assert "--max-queue-requests" in str(rejection)
            assert rejection.retry_after_s >= 1
            assert client.rejection("", -1) is None
            assert idle.rejection("", 0) is None
            waiting.cancel()
            await until(lambda: client.rejection("", 0) is None)
            running.cancel()
            await asyncio.gather(running, waiting, return_exceptions=True)
            assert client.rejection("", 0) is None

    asyncio.run(scenario())


def test_what_can_never_run_is_refused_with_a_remedy(tmp_path):
    async def scenario() -> None:
        async with engine_of(tmp_path, FakeRunner(fake_info(max_model_len=8))) as rig:
            client = await rig.connect()
            with pytest.raises(InvalidRequestError, match=r"9 tokens .* is 8: shorten"):
                await tokens_of(client, request_of(prompt=range(9)))
            assert client.num_open_requests == 0

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00\x00\x00\x04junk",
        b"\x7f\xff\xff\xff",
        2 * wire.encode_frame(request_of("twice", max_tokens=500)),
    ],
)
def test_a_peer_that_breaks_the_protocol_is_dropped_alone(tmp_path, caplog, data):
    gate = StepGate()

    async def scenario() -> None:
        async with engine_of(tmp_path, FakeRunner(before_step=gate)) as rig:
            client = await rig.connect()
            good = asyncio.create_task(tokens_of(client, request_of("good")))
            await until(lambda: gate.is_holding)
            reader, writer = await asyncio.open_unix_connection(rig.config.socket_path)
            writer.write(data)
            with contextlib.suppress(ConnectionError):
                await asyncio.wait_for(reader.read(-1), DEADLINE_S)
            writer.close()
            gate.open()
            assert await good == expected_token_ids(request_of("good"))
            assert rig.server.num_workers == 1

    asyncio.run(scenario())
    (line,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "violated the protocol" in line.getMessage()
    assert line.exc_info is None


def test_a_worker_that_does_not_read_is_dropped_and_blocks_nobody(tmp_path):
    async def scenario() -> None:
        async with engine_of(tmp_path, max_outgoing_bytes=2000) as rig:
            client = await rig.connect()
            _, writer = await asyncio.open_unix_connection(rig.config.socket_path, limit=2)
            writer.transport.pause_reading()
            await until(lambda: rig.server.num_workers == 2)
            for number in range(100):  # each is refused, and its refusal is never read
                writer.write(wire.encode_frame(request_of(str(number) * 4000, prompt=[-1])))
            await until(lambda: rig.server.num_workers == 1)
            assert len(await tokens_of(client, request_of())) == 4
            writer.close()

    asyncio.run(scenario())


def test_aborting_unknown_finished_and_foreign_requests_changes_nothing(tmp_path):
    gate = StepGate(4)

    async def scenario() -> None:
        async with engine_of(tmp_path, FakeRunner(before_step=gate)) as rig:
            client = await rig.connect()
            await tokens_of(client, request_of("done"))
            mine = asyncio.create_task(tokens_of(client, request_of("mine")))
            await until(lambda: gate.is_holding)
            reader, writer = await asyncio.open_unix_connection(rig.config.socket_path)
            writer.write(wire.encode_frame(AbortRequests(["done", "mine", "unknown"])))
            # A worker's connection is read in order: what it asks then comes after its aborts.
            writer.write(wire.encode_frame(request_of("last", prompt=())))
            await writer.drain()
            await until_refused(reader, "last")
            gate.open()
            assert await mine == expected_token_ids(request_of("mine"))
            writer.close()

    asyncio.run(scenario())


def test_heartbeats_tell_the_counts_and_the_age_of_the_running_step(tmp_path):
    gate = StepGate()

    async def scenario() -> None:
        runner = FakeRunner(before_step=gate)
        async with engine_of(tmp_path, runner, heartbeat_interval_s=0.01) as rig:
            client = await rig.connect()
            await until(lambda: client.heartbeat_age_s < 1 and client.step_age_s == 0)
            task = asyncio.create_task(tokens_of(client, image_request()))
            await until(lambda: client.step_age_s > 0.05)
            assert client.stats.num_running == 1
            assert client.stats.image_blocks_used == 2
            assert client.stats.image_blocks_total == 32
            gate.open()
            await task
            await until(lambda: client.stats.num_images_encoded == 1)
            await until(lambda: client.stats.num_steps == 4 and client.step_age_s == 0)

    asyncio.run(scenario())


def test_the_first_output_tells_how_many_tokens_were_cached_and_how_long_it_waited(tmp_path):
    async def scenario() -> None:
        async with engine_of(tmp_path, max_num_batched_tokens=16, max_num_seqs=16) as rig:
            client = await rig.connect()
            for name, num_cached in (("a", 0), ("b", 32)):
                request = image_request(name, prompt=range(40))
                outputs = [one async for one in client.generate(request)]
                assert outputs[0].num_cached_tokens == num_cached
                assert outputs[0].queue_s > 0
                assert {(one.num_cached_tokens, one.queue_s) for one in outputs[1:]} <= {(0, 0.0)}
            stats = rig.engine.stats()
            assert (stats.prefix_tokens_queried, stats.prefix_tokens_hit) == (80, 32)
            assert (stats.image_cache_hits, stats.image_cache_misses) == (1, 1)
            assert (stats.image_blocks_used, stats.image_blocks_cached) == (0, 2)
            assert stats.text_blocks_cached == 2
            assert stats.num_images_encoded == 1

    asyncio.run(scenario())


def test_caches_that_are_switched_off_keep_nothing(tmp_path):
    async def scenario() -> None:
        async with engine_of(tmp_path, prefix_cache=False, image_cache=False) as rig:
            client = await rig.connect()
            for name in "ab":
                await tokens_of(client, image_request(name, prompt=range(40)))
            stats = rig.engine.stats()
            assert (stats.text_blocks_cached, stats.image_blocks_cached) == (0, 0)
            assert stats.prefix_tokens_hit == 0
            assert stats.num_images_encoded == 2

    asyncio.run(scenario())


def test_the_socket_is_for_its_owner_alone_and_is_removed_at_the_end(tmp_path):
    async def scenario() -> None:
        async with engine_of(tmp_path) as rig:
            assert stat.S_IMODE(os.stat(rig.config.socket_path).st_mode) == 0o600
        assert list(tmp_path.iterdir()) == []

    asyncio.run(scenario())


def test_a_stale_socket_is_replaced_but_a_live_one_and_a_file_are_not(tmp_path):
    async def scenario() -> None:
        async with engine_of(tmp_path) as rig:
            with pytest.raises(SocketPathError, match="another engine listens"):
                await EngineServer(rig.config).start()
            assert len(await tokens_of(await rig.connect(), request_of())) == 4
        leave_stale_socket(rig.config.socket_path)
        async with engine_of(tmp_path) as rig:
            assert len(await tokens_of(await rig.connect(), request_of())) == 4
        (tmp_path / "engine.sock").write_text("a file")
        with pytest.raises(SocketPathError, match="is not a socket"):
            await EngineServer(rig.config).start()
        too_long = EngineConfig(model="fake", socket_path=str(tmp_path / ("x" * 120)))
        with pytest.raises(SocketPathError, match="107 bytes"):
            await EngineServer(too_long).start()

    asyncio.run(scenario())


def leave_stale_socket(path: str) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)


def test_closing_the_engine_ends_every_open_request_once(tmp_path):
    gate = StepGate()

    async def scenario() -> None:
        config = EngineConfig(
            model="fake", socket_path=str(tmp_path / "engine.sock"), max_num_seqs=1
        )
        server = EngineServer(config)
        await server.start()
        engine = Engine(FakeRunner(before_step=gate), config, server.send)
        server.attach(engine)
        running = asyncio.create_task(engine.run())
        client = EngineClient(config.socket_path)
        await client.connect(5)
        await client.wait_ready(5)
        tasks = [asyncio.create_task(tokens_of(client, request_of(name))) for name in "ab"]
        await until(lambda: engine.stats().num_waiting == 1 and gate.is_holding)
        engine.close(EngineDeadError("the engine is stopping"))
        running.cancel()
        await server.close()
        for answer in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(answer, EngineDeadError)
            assert str(answer) == "the engine is stopping"
        gate.open()
        await client.close()

    asyncio.run(scenario())


def test_heartbeats_that_end_by_a_fault_say_so_in_the_log(tmp_path, caplog, monkeypatch):
    """Else the engine would be ended as one that hangs, and nobody knew of what."""

    def stats() -> None:
        raise AttributeError("no such figure")

    async def scenario() -> None:
        async with engine_of(tmp_path, heartbeat_interval_s=0.01) as rig:
            with monkeypatch.context() as patch:
                patch.setattr(rig.engine, "stats", stats)
                await until(lambda: "no such figure" in caplog.text)

    asyncio.run(scenario())
    assert [one.getMessage() for one in caplog.records] == ["heartbeats failed"]
