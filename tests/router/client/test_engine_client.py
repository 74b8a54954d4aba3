"""The client's side of a dying, loading or slow engine, and the engine's own process."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import msgspec
import pytest
from support.fake_runner import expected_token_ids, fake_image
from support.polling import until, wait_until

from vlmserve.models.batch import ImageSpan, PromptLogprobs, TokenLogprobs
from vlmserve.router.client.engine_client import EngineClient
from vlmserve.router.config import EngineConfig
from vlmserve.router.errors import (
    EngineDeadError,
    EngineInternalError,
    InvalidRequestError,
    QueueFullError,
)
from vlmserve.router.messages import (
    AbortRequests,
    AddRequest,
    EngineReady,
    EngineStats,
    Heartbeat,
    ImagePiece,
    Rejection,
    RequestFailed,
    SequenceOutput,
    StepOutputs,
    ToEngine,
)
from vlmserve.router.processes import wire

DEADLINE_S = 120.0

READY = EngineReady(
    pid=1,
    max_model_len=100,
    vocab_size=1000,
    max_num_seqs=4,
    device="fake",
    dtype="hash",
    num_text_tokens=100,
    num_image_tiles=4,
)

FAKE_ENGINE = f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
FAKE_ENGINE += """
import threading
from vlmserve.router.engine.process import main
from support.fake_runner import FakeRunner

def load(config):
    {load}
    return FakeRunner(step_seconds={step_seconds})

main(load)
"""


def request_of(request_id="a", max_tokens=4, **fields) -> AddRequest:
    return AddRequest(
        request_id=request_id, prompt_token_ids=[1, 2, 3], max_tokens=max_tokens, **fields
    )


async def tokens_of(client: EngineClient, request: AddRequest) -> list[int]:
    return [token_id async for output in client.generate(request) for token_id in output.token_ids]


class ScriptedEngine:
    """A peer that says what a test tells it to."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.received: list[ToEngine] = []
        self.writers: list[asyncio.StreamWriter] = []
        self.num_marks = 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        with contextlib.suppress(Exception):
            while message := await wire.read_message(reader, wire.to_engine_decoder):
                self.received.append(message)

    def say(self, message: msgspec.Struct) -> None:
        self.writers[-1].write(wire.encode_frame(message))

    async def until_read(self, client: EngineClient) -> None:
        """Wait until the client has taken all that was said: it reads in order."""
        self.num_marks += 1
        self.say(Heartbeat(stats=EngineStats(num_steps=self.num_marks)))
        await until(lambda: client.stats.num_steps == self.num_marks)

    def output(self, *token_ids: int, request_id="a", finish_reason=None) -> None:
        output = SequenceOutput(
            request_id=request_id, token_ids=list(token_ids), finish_reason=finish_reason
        )
        self.say(StepOutputs(outputs=[output]))

    def hang_up(self) -> None:
        self.writers[-1].transport.abort()


@contextlib.asynccontextmanager
async def scripted_engine(tmp_path: Path) -> AsyncIterator[ScriptedEngine]:
    engine = ScriptedEngine(str(tmp_path / "engine.sock"))
    server = await asyncio.start_unix_server(engine._serve, engine.path)
    try:
        yield engine
    finally:
        server.close()
        for writer in engine.writers:
            writer.close()


async def asked(
    engine: ScriptedEngine, client: EngineClient, request: AddRequest
) -> tuple[AsyncGenerator[SequenceOutput, None], asyncio.Future[SequenceOutput]]:
    """The outputs of a request that the engine has received, and the first of them to come."""
    outputs = client.generate(request)
    first = asyncio.ensure_future(anext(outputs))
    await until(lambda: len(engine.received) == 1)
    return outputs, first


async def connected(engine: ScriptedEngine, **options) -> EngineClient:
    client = EngineClient(engine.path, **options)
    await client.connect(5)
    await until(lambda: bool(engine.writers))
    engine.say(READY)
    assert await client.wait_ready(5) == READY
    return client


@pytest.fixture
def talk(tmp_path):
    """Runs a scenario with a scripted engine and a client that is connected to it."""

    def run(scenario, **options) -> None:
        async def whole() -> None:
            async with scripted_engine(tmp_path) as engine:
                client = await connected(engine, **options)
                await scenario(engine, client)
                await client.close()

        asyncio.run(whole())

    return run


def test_a_refusal_that_no_step_renews_is_forgotten(talk, monkeypatch):
    monkeypatch.setattr("vlmserve.router.client.engine_client.REJECTION_S", 1e9)

    async def scenario(engine: ScriptedEngine, client: EngineClient) -> None:
        task = asyncio.create_task(tokens_of(client, request_of()))
        await until(lambda: bool(engine.received))
        refusal = Rejection(owner="", message="full", retry_after_s=2.0)
        engine.say(StepOutputs(outputs=[], rejections=[refusal]))
        await until(lambda: client.rejection("", 0) is not None)
        assert client.rejection("", 0).retry_after_s == 2.0
        monkeypatch.setattr("vlmserve.router.client.engine_client.REJECTION_S", 0.0)
        await until(lambda: client.rejection("", 0) is None)
        task.cancel()

    talk(scenario)


def test_an_engine_that_goes_away_fails_every_open_request_and_is_told_once(talk):
    deaths: list[int] = []

    async def scenario(engine: ScriptedEngine, client: EngineClient) -> None:
        tasks = [asyncio.create_task(tokens_of(client, request_of(name))) for name in "abc"]
        await until(lambda: len(engine.received) == 3)
        engine.hang_up()
        for answer in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(answer, EngineDeadError)
        assert (client.is_ready, client.is_connected, client.info) == (False, False, None)
        with pytest.raises(EngineDeadError, match="not ready"):
            await tokens_of(client, request_of())
        await client.close()
        assert deaths == [1]

    talk(scenario, on_dead=lambda: deaths.append(1))


class CountedIds(list):
    """The token ids of a prompt, of which the test counts how many are alive."""

    alive = 0

    def __init__(self, ids) -> None:
        super().__init__(ids)
        CountedIds.alive += 1

    def __del__(self) -> None:
        CountedIds.alive -= 1


def test_a_request_that_the_engine_fails_is_freed_without_a_garbage_collection(talk):
    """Its error was kept beside the frames that it refers to, and the request with them."""

    async def fail_one(engine: ScriptedEngine, client: EngineClient) -> None:
        request = msgspec.structs.replace(request_of(), prompt_token_ids=CountedIds([1, 2, 3]))
        answer = asyncio.ensure_future(tokens_of(client, request))
        await until(lambda: bool(engine.received))
        engine.say(RequestFailed(request_id="a", kind="internal", message="failed"))
        await asyncio.wait([answer])
        assert isinstance(answer.exception(), EngineInternalError)

    async def scenario(engine: ScriptedEngine, client: EngineClient) -> None:
        gc.collect()
        gc.disable()
        try:
            await fail_one(engine, client)
            await asyncio.sleep(0.01)
            assert CountedIds.alive == 0
        finally:
            gc.enable()

    talk(scenario)


def test_a_request_to_an_engine_that_has_just_died_is_told_so_under_uvloop_too(talk):
    """uvloop's RuntimeError for a write to a lost connection became a 500."""

    async def scenario(engine: ScriptedEngine, client: EngineClient) -> None:

        def lost(data: object) -> None:
            raise RuntimeError("unable to perform operation; the handler is closed")

        client._writer.write = client._writer.writelines = lost  # type: ignore[union-attr]
        task = asyncio.create_task(tokens_of(client, request_of()))
        await asyncio.sleep(0)
        engine.hang_up()
        with pytest.raises(EngineDeadError):
            await task

    talk(scenario)


def test_an_engine_that_speaks_nonsense_counts_as_dead(talk):
    deaths: list[int] = []

    async def scenario(engine: ScriptedEngine, client: EngineClient) -> None:
        task = asyncio.create_task(tokens_of(client, request_of()))
        await until(lambda: len(engine.received) == 1)
        engine.writers[-1].write(b"\x00\x00\x00\x01\xc1")
        with pytest.raises(EngineDeadError):
            await task
        assert deaths == [1]

    talk(scenario, on_dead=lambda: deaths.append(1))


def test_a_fault_while_a_message_is_taken_in_leaves_nobody_waiting(talk, caplog):
    """The reader ended alone: the connection looked alive, and requests waited for ever."""
    deaths = []

    async def scenario(engine: ScriptedEngine, client: EngineClient) -> None:
        _, first = await asked(engine, client, request_of())
        client._streams["a"].deliver = None
        engine.output(1)
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(first, DEADLINE_S)
        assert deaths == ["dead"]
        assert not client.is_connected

    talk(scenario, on_dead=lambda: deaths.append("dead"))
    assert "processing an engine's message failed" in caplog.text


def test_a_client_connects_again_after_its_engine_died(talk):
    async def scenario(engine: ScriptedEngine, client: EngineClient) -> None:
        engine.hang_up()
        await until(lambda: not client.is_connected)
        await client.connect(5)
        await until(lambda: len(engine.writers) == 2)
        assert not client.is_ready
        engine.say(READY)
        await client.wait_ready(5)

    talk(scenario)


def test_closing_a_client_fails_its_requests_without_calling_the_engine_dead(talk):
    deaths: list[int] = []

    async def scenario(engine: ScriptedEngine, client: EngineClient) -> None:
        task = asyncio.create_task(tokens_of(client, request_of()))
        await until(lambda: len(engine.received) == 1)
        await client.close()
        with pytest.raises(EngineDeadError, match="worker is stopping"):
            await task
        assert deaths == []

    talk(scenario, on_dead=lambda: deaths.append(1))


def test_connecting_waits_for_the_socket_to_appear_and_gives_up_at_its_timeout(tmp_path):
    async def scenario() -> None:
        client = EngineClient(str(tmp_path / "engine.sock"))
        with pytest.raises(EngineDeadError, match="no engine answers"):
            await client.connect(timeout_s=0.05)
        connecting = asyncio.create_task(client.connect(DEADLINE_S))
        await asyncio.sleep(0)
        async with scripted_engine(tmp_path) as engine:
            await connecting
            await until(lambda: bool(engine.writers))
            with pytest.raises(TimeoutError):
                await client.wait_ready(0.02)
            waiting = asyncio.create_task(client.wait_ready())
            await asyncio.sleep(0)
            engine.hang_up()
            with pytest.raises(EngineDeadError, match="before its model was loaded"):
                await waiting
            await client.close()

    asyncio.run(scenario())


def test_a_slow_reader_gets_all_tokens_in_order_and_joined(talk):
    async def scenario(engine: ScriptedEngine, client: EngineClient) -> None:
        outputs, first = await asked(engine, client, request_of())
        engine.output(1)
        assert (await first).token_ids == [1]
        engine.output(2)
        engine.output(3)
        engine.output(4, finish_reason="stop")
        await engine.until_read(client)
        rest = [output async for output in outputs]
        assert [output.token_ids for output in rest] == [[2, 3, 4]]
        assert rest[-1].finish_reason == "stop"
        assert client.num_open_requests == 0
        await client.close()
        assert not any(isinstance(one, AbortRequests) for one in engine.received)

    talk(scenario)


def test_joined_outputs_keep_what_the_first_told_and_how_the_last_ended(talk):
    told = [None, PromptLogprobs(4, -0.5, 1, [], [])]
    entries = [TokenLogprobs(-float(number), [], []) for number in range(2)]
    first = SequenceOutput(
        request_id="a",
        token_ids=[1],
        logprobs=entries[:1],
        num_cached_tokens=16,
        queue_s=0.5,
        prompt_logprobs=told,
    )
    last = SequenceOutput(
        request_id="a",
        token_ids=[2],
        logprobs=entries[1:],
        finish_reason="stop",
        stop_token_id=2,
    )

    async def scenario(engine: ScriptedEngine, client: EngineClient) -> None:
        outputs, started = await asked(engine, client, request_of())
        engine.say(StepOutputs(outputs=[first, last]))
        joined = await started
        await outputs.aclose()
        assert joined == SequenceOutput(
            request_id="a",
            token_ids=[1, 2],
            logprobs=entries,
            num_cached_tokens=16,
            queue_s=0.5,
            prompt_logprobs=told,
            finish_reason="stop",
            stop_token_id=2,
        )

    talk(scenario)


def test_tokens_that_came_before_the_engine_died_are_not_lost(talk):
    async def scenario(engine: ScriptedEngine, client: EngineClient) -> None:
        outputs, first = await asked(engine, client, request_of())
        engine.output(1)
        await first
        engine.output(2)
        await engine.until_read(client)
        engine.hang_up()
        await until(lambda: not client.is_connected)
        assert (await anext(outputs)).token_ids == [2]
        with pytest.raises(EngineDeadError):
            await anext(outputs)

    talk(scenario)


@pytest.mark.parametrize("way", ["cancel", "close"])
def test_leaving_early_sends_one_abort(talk, way):
    async def scenario(engine: ScriptedEngine, client: EngineClient) -> None:
        outputs, first = await asked(engine, client, request_of())
        if way == "cancel":
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
        else:
            engine.output(1)
            await first
            await outputs.aclose()
        await until(lambda: len(engine.received) == 2)
        assert engine.received[1] == AbortRequests(["a"])
        engine.output(7)  # crosses the abort: nobody waits for it
        assert client.num_open_requests == 0

    talk(scenario)


def test_of_several_answers_only_those_that_are_open_are_aborted(talk):
    async def scenario(engine: ScriptedEngine, client: EngineClient) -> None:
        outputs, first = await asked(engine, client, request_of("a", choice_ids=["b", "c"]))
        engine.output(1, request_id="b", finish_reason="stop")
        await first
        await outputs.aclose()
        await until(lambda: len(engine.received) == 2)
        assert engine.received[1] == AbortRequests(["a", "c"])

    talk(scenario)


def test_of_several_failures_the_first_is_told_and_nothing_of_a_dead_engine_stays(talk):
    async def scenario(engine: ScriptedEngine, client: EngineClient) -> None:
        _, first = await asked(engine, client, request_of("a", choice_ids=["b"]))
        engine.say(Heartbeat(stats=EngineStats(num_running=2), stall_s=1.0))
        await until(lambda: client.stats.num_running == 2)
        failed = [
            RequestFailed(request_id="a", kind="queue_full", message="full"),
            RequestFailed(request_id="b", kind="internal", message="failed"),
        ]
        engine.writers[-1].write(b"".join(map(wire.encode_frame, failed)))
        with pytest.raises(QueueFullError):
            await first
        engine.hang_up()
        await until(lambda: not client.is_connected)
        assert (client.stats, client.stall_s) == (EngineStats(), 0.0)

    talk(scenario)


def test_an_id_that_is_open_is_not_opened_again(talk):
    async def scenario(engine: ScriptedEngine, client: EngineClient) -> None:
        task = asyncio.create_task(tokens_of(client, request_of()))
        await until(lambda: len(engine.received) == 1)
        with pytest.raises(ValueError, match="already open"):
            await tokens_of(client, request_of())
        engine.output(5, finish_reason="length")
        assert await task == [5]

    talk(scenario)


def test_a_request_larger_than_a_frame_is_invalid_and_never_sent(talk):
    async def scenario(engine: ScriptedEngine, client: EngineClient) -> None:
        with pytest.raises(InvalidRequestError, match="too large"):
            await tokens_of(client, request_of("a" * 400))
        assert client.num_open_requests == 0
        await client.close()
        assert engine.received == []

    talk(scenario, max_frame_bytes=300)


# The engine's own process


class EngineProcess:
    """An engine process under test, with the fake runner or with a real start."""

    def __init__(self, tmp_path: Path, load: str = "pass", step_seconds: float = 0.0) -> None:
        self.config = EngineConfig(model="fake", socket_path=str(tmp_path / "engine.sock"))
        self.script = FAKE_ENGINE.format(load=load, step_seconds=step_seconds)

    def start(self, settings: bytes | None = None, script: str | None = None) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", script or self.script],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdin is not None
        process.stdin.write(settings or msgspec.json.encode(self.config) + b"\n")
        process.stdin.flush()
        return process

    async def client(self) -> EngineClient:
        client = EngineClient(self.config.socket_path)
        await client.connect(DEADLINE_S)
        return client


def end(process: subprocess.Popen) -> tuple[int, str]:
    try:
        _, stderr = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
        process.wait()
    return process.returncode, stderr.decode()


def test_the_process_serves_and_ends_cleanly_on_sigterm(tmp_path):
    setup = EngineProcess(tmp_path)
    process = setup.start()

    async def scenario() -> None:
        client = await setup.client()
        info = await client.wait_ready(DEADLINE_S)
        assert info.pid == process.pid
        assert await tokens_of(client, request_of()) == expected_token_ids(request_of())
        process.send_signal(signal.SIGINT)  # the parent's to handle
        assert await tokens_of(client, request_of()) == expected_token_ids(request_of())
        process.send_signal(signal.SIGTERM)
        await until(lambda: not client.is_connected)
        await client.close()

    asyncio.run(scenario())
    assert end(process)[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_an_engine_process_that_is_killed_while_it_is_sent_an_image(tmp_path):
    """Its requests fail at once, and the next engine is sent the whole image."""
    setup = EngineProcess(tmp_path)
    process = setup.start()
    request = request_of(images=[fake_image("p", 2)], spans=[ImageSpan(1)])

    async def scenario() -> int:
        client = await setup.client()
        await client.wait_ready(DEADLINE_S)
        is_asked = asyncio.Event()

        async def held(piece: ImagePiece) -> None:
            is_asked.set()
            await asyncio.Event().wait()

        client._images._send = held
        waiting = asyncio.create_task(tokens_of(client, request))
        await is_asked.wait()
        process.kill()
        with pytest.raises(EngineDeadError):
            await waiting
        assert client._images._images == {}
        next_process = setup.start()
        try:
            await client.connect(DEADLINE_S)
            await client.wait_ready(DEADLINE_S)
            assert await tokens_of(client, request) == expected_token_ids(request)
            await client.close()
            next_process.send_signal(signal.SIGTERM)
        finally:
            ended = end(next_process)
        return ended[0]

    assert asyncio.run(scenario()) == 0
    assert end(process)[0] == -signal.SIGKILL


def test_an_engine_whose_device_is_lost_ends_rather_than_fail_every_request(tmp_path):
    """It went on, ready as ever, and answered each request by an error."""
    setup = EngineProcess(tmp_path)
    lost = (
        "from vlmserve.models.batch import DeviceLostError\n"
        "    def fail(batch): raise DeviceLostError('cuda:0 can compute nothing more')\n"
        "    return FakeRunner(before_step=fail)"
    )
    process = setup.start(script=FAKE_ENGINE.format(load=lost, step_seconds=0.0))

    async def scenario() -> None:
        client = await setup.client()
        await client.wait_ready(DEADLINE_S)
        with pytest.raises(EngineDeadError):
            await tokens_of(client, request_of())
        await client.close()

    asyncio.run(scenario())
    assert end(process)[0] == 1


def test_sigterm_ends_running_requests_with_an_error_even_in_an_endless_step(tmp_path):
    setup = EngineProcess(tmp_path, step_seconds=3600)
    process = setup.start()

    async def scenario() -> None:
        client = await setup.client()
        await client.wait_ready(DEADLINE_S)
        task = asyncio.create_task(tokens_of(client, request_of()))
        await until(lambda: client.stats.num_running == 1)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(EngineDeadError, match="the engine is stopping"):
            await asyncio.wait_for(task, DEADLINE_S)
        await client.close()

    asyncio.run(scenario())
    assert end(process)[0] == 0


def test_while_the_model_loads_workers_connect_and_requests_are_refused(tmp_path):
    setup = EngineProcess(tmp_path, load="sys.stdin.buffer.readline()")
    process = setup.start()

    async def scenario() -> None:
        client = await setup.client()
        await until(lambda: client.heartbeat_age_s < 5)
        assert not client.is_ready
        reader, writer = await asyncio.open_unix_connection(setup.config.socket_path)
        writer.write(wire.encode_frame(request_of("early", choice_ids=["second"])))
        for request_id in ("early", "second"):
            while True:
                message = await wire.read_message(reader, wire.from_engine_decoder)
                if getattr(message, "request_id", None) == request_id:
                    break
            assert (message.kind, message.message) == (
                "engine_dead",
                "the engine is still loading its model",
            )
        writer.close()
        process.stdin.write(b"go on\n")
        process.stdin.flush()
        await client.wait_ready(DEADLINE_S)
        assert len(await tokens_of(client, request_of())) == 4
        process.send_signal(signal.SIGTERM)
        await client.close()

    asyncio.run(scenario())
    assert end(process)[0] == 0


def test_sigterm_ends_a_process_that_is_still_loading(tmp_path):
    setup = EngineProcess(tmp_path, load="threading.Event().wait()")
    process = setup.start()

    async def scenario() -> None:
        client = await setup.client()
        process.send_signal(signal.SIGTERM)
        await until(lambda: not client.is_connected)
        await client.close()

    asyncio.run(scenario())
    assert end(process)[0] == 0


def test_a_model_that_cannot_be_loaded_is_one_line_and_exit_code_3(tmp_path):
    setup = EngineProcess(tmp_path, load="raise ValueError('no config.json there')")
    code, stderr = end(setup.start())
    assert code == 3
    assert stderr == "error: cannot load the model 'fake': no config.json there\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (b"nonsense\n", "malformed"),
        (b'{"model": "m", "socket_path": "s", "max_num_seqs": 0}\n', "max_num_seqs"),
        (b'{"model": "m", "socket_path": "/nowhere/at/all"}\n', "/nowhere/at/all"),
        (b'{"model": "m", "socket_path": "s", "parent_pid": 1}\n', "parent"),
    ],
)
def test_settings_that_cannot_be_used_are_one_line_and_exit_code_2(tmp_path, settings, message):
    code, stderr = end(EngineProcess(tmp_path).start(settings))
    assert code == 2
    assert stderr.startswith("error: ")
    assert message in stderr
    assert stderr.count("\n") == 1


def test_the_engine_dies_with_its_parent(tmp_path):
    setup = EngineProcess(tmp_path)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, setup.script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    parent.stdin.write(msgspec.json.encode(setup.config) + b"\n")
    parent.stdin.flush()
    engine_pid = int(parent.stdout.readline())

    async def scenario() -> None:
        client = await setup.client()
        await client.wait_ready(DEADLINE_S)
        parent.kill()
        await until(lambda: not client.is_connected)
        await client.close()

    asyncio.run(scenario())
    parent.communicate(timeout=DEADLINE_S)
    assert wait_until(lambda: not is_alive(engine_pid)), "the engine outlives its parent"


PARENT = """
import subprocess, sys
engine = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(engine.pid, flush=True)
engine.wait()
"""


def is_alive(pid: int) -> bool:
    """False for a zombie too: whoever adopted it may never reap it."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as status:
            return status.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
