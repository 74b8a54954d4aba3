"""Adapters in the engine: read beside the loop, shared, forgotten; none delays other requests."""

from __future__ import annotations

import asyncio
import threading

from support.fake_runner import FakeAdapters, FakeRunner, expected_token_ids, fake_adapter
from support.polling import FAR_S, until

from vlmserve.models.batch import AdapterInfo, AdapterRef
from vlmserve.router.client.engine_client import EngineClient
from vlmserve.router.config import EngineConfig
from vlmserve.router.engine.engine import Engine
from vlmserve.router.engine.server import EngineServer
from vlmserve.router.errors import EngineDeadError
from vlmserve.router.messages import AddRequest, FromEngine, RequestFailed, StepOutputs


class Bench:
    """An engine whose adapters called slow are read when the test lets them."""

    def __init__(self, **options) -> None:
        self.may_read = threading.Event()
        self.is_reading = threading.Event()
        self.adapters = FakeAdapters(max_loras=2, before_read=self._read)
        self.runner = FakeRunner(adapters=self.adapters)
        config = EngineConfig(model="fake", socket_path="", max_loras=2, **options)
        self.engine = Engine(self.runner, config, self._receive)
        self.tokens: dict[str, list[int]] = {}
        self.endings: dict[str, str] = {}

    def _read(self, ref: AdapterRef) -> None:
        if "slow" in ref.name:
            self.is_reading.set()
            assert self.may_read.wait(FAR_S)

    def _receive(self, worker_id: int, message: FromEngine) -> None:
        if isinstance(message, RequestFailed):
            self._end(message.request_id, f"{message.kind}: {message.message}")
        elif isinstance(message, StepOutputs):
            for output in message.outputs:
                self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
                if output.finish_reason is not None:
                    self._end(output.request_id, output.finish_reason)

    def _end(self, request_id: str, ending: str) -> None:
        assert request_id not in self.endings, "two final messages"
        self.endings[request_id] = ending

    def add(self, request_id: str, adapter: str | None = None, **fields) -> AddRequest:
        request = request_of(request_id, adapter, **fields)
        self.engine.add(1, request)
        return request

    async def until(self, *request_ids: str) -> None:
        await until(lambda: set(request_ids) <= set(self.endings))

    async def until_reading(self) -> None:
        await until(self.is_reading.is_set)


def request_of(request_id: str, adapter: str | None = None, **fields) -> AddRequest:
    named = None if adapter is None else fake_adapter(adapter)
    fields = {"prompt_token_ids": [1, 2, 3], "max_tokens": 5} | fields
    return AddRequest(request_id=request_id, adapter=named, **fields)


def run(scenario, **options) -> Bench:
    """Play a scenario on an engine; options are fields of EngineConfig."""

    async def whole() -> Bench:
        bench = Bench(**options)
        running = asyncio.create_task(bench.engine.run())
        try:
            async with asyncio.timeout(FAR_S):
                await scenario(bench)
        finally:
            bench.may_read.set()
            running.cancel()
            bench.engine.close(EngineDeadError("over"))
        assert bench.engine.scheduler.snapshot().text.used == 0
        assert len(bench.engine.scheduler.queue) == 0
        return bench

    return asyncio.run(whole())


def test_an_adapter_is_read_at_its_first_use_and_then_kept():
    async def scenario(bench: Bench) -> None:
        requests = [bench.add(str(number), "text1") for number in range(3)]
        await bench.until("0", "1", "2")
        requests.append(bench.add("3", "text1"))
        await bench.until("3")
        assert bench.tokens == {one.request_id: expected_token_ids(one) for one in requests}

    bench = run(scenario)
    assert bench.adapters.read_names == ["text1"]


def test_others_are_answered_while_an_adapter_is_read():
    async def scenario(bench: Bench) -> None:
        bench.add("slow", "slow text")
        await bench.until_reading()
        bench.add("base")
        await bench.until("base")
        assert bench.engine.stats().waiting_adapters == {"slow text": 1}
        bench.may_read.set()
        await bench.until("slow")
        assert bench.engine.stats().waiting_adapters == {}

    bench = run(scenario)
    assert bench.endings == {"slow": "length", "base": "length"}


def test_an_adapter_that_cannot_be_read_ends_its_own_requests_only():
    async def scenario(bench: Bench) -> None:
        bench.add("bad", "broken", choice_ids=["worse"])
        bench.add("good", "text")
        await bench.until("bad", "worse", "good")

    bench = run(scenario)
    failed = "adapter: adapter_model.safetensors: it is broken"
    assert bench.endings == {"bad": failed, "worse": failed, "good": "length"}


def test_what_leaves_while_its_adapter_is_read_ends_once():
    async def scenario(bench: Bench) -> None:
        bench.add("gone", "slow text", choice_ids=["stays"])
        await bench.until_reading()
        bench.engine.abort(1, ["gone"])
        bench.may_read.set()
        await bench.until("gone", "stays")

    bench = run(scenario)
    assert bench.endings == {"gone": "abort", "stays": "length"}


def test_the_unused_adapter_that_was_used_longest_ago_is_forgotten():
    async def scenario(bench: Bench) -> None:
        for name in ("text1", "text2", "text1", "text3", "text2"):
            request_id = f"{name}-{len(bench.endings)}"
            bench.add(request_id, name)
            await bench.until(request_id)
        gone = [fake_adapter(name).digest for name in ("text2", "text1")]
        await until(lambda: bench.adapters.forgotten == gone)

    # three of ten bytes are over the bound
    bench = run(scenario, lora_host_bytes=25)
    assert bench.adapters.read_names == ["text1", "text2", "text3", "text2"]


def test_forgetting_waits_for_no_read():
    """The runner's adapters are locked while one is read."""

    async def scenario(bench: Bench) -> None:
        bench.add("a", "text")
        await bench.until("a")
        bench.add("slow", "slow text")
        await bench.until_reading()
        unloading = asyncio.create_task(bench.engine.unload_adapter(fake_adapter("text").digest))
        bench.add("base")
        await bench.until("base")
        assert not unloading.done()
        bench.may_read.set()
        await unloading
        await bench.until("slow")

    assert run(scenario).adapters.forgotten == [fake_adapter("text").digest]


def test_an_adapter_in_use_is_kept_and_the_next_one_waits():
    async def scenario(bench: Bench) -> None:
        bench.add("long", "text1", max_tokens=200)
        bench.add("next", "text2", max_tokens=1)
        await bench.until("long", "next")

    bench = run(scenario, lora_host_bytes=5)
    assert list(bench.endings) == ["long", "next"]
    assert bench.adapters.read_names == ["text1", "text2"]


def test_what_waits_for_memory_and_leaves_is_never_read():
    async def scenario(bench: Bench) -> None:
        bench.add("long", "text1", max_tokens=200)
        bench.add("next", "text2")
        bench.engine.abort(1, ["next"])
        await bench.until("long", "next")

    assert run(scenario, lora_host_bytes=5).adapters.read_names == ["text1"]


def test_unloading_waits_for_the_answers_that_use_the_adapter():
    async def scenario(bench: Bench) -> None:
        bench.add("long", "text1", max_tokens=100)
        await until(lambda: bench.engine.scheduler.num_running)
        await bench.engine.unload_adapter(fake_adapter("text1").digest)
        assert bench.endings == {"long": "length"}
        await bench.engine.unload_adapter("unknown")

    assert run(scenario).adapters.forgotten == [fake_adapter("text1").digest]


def test_an_engine_without_adapters_rejects_them():
    async def scenario(bench: Bench) -> None:
        bench.runner.adapters = None
        engine = Engine(bench.runner, EngineConfig(model="fake", socket_path=""), bench._receive)
        engine.add(1, request_of("a", "text"))
        await bench.until("a")
        engine.close(EngineDeadError("over"))

    assert "--max-loras" in run(scenario).endings["a"]


def test_workers_load_and_unload_over_the_socket(tmp_path):
    async def scenario() -> None:
        adapters = FakeAdapters(max_loras=1)
        config = EngineConfig(model="fake", socket_path=str(tmp_path / "e.sock"), max_loras=1)
        server, client = EngineServer(config), EngineClient(config.socket_path)
        await server.start()
        await client.connect(FAR_S)
        engine = Engine(FakeRunner(adapters=adapters), config, server.send)
        try:
            with_error(await outcome(client.load_adapter(fake_adapter("text"))), "not ready")
            server.attach(engine)
            await client.wait_ready(FAR_S)
            info = await client.load_adapter(fake_adapter("text"))
            assert info == AdapterInfo(4, 10, changes_text=True, changes_images=False)
            with_error(await outcome(client.load_adapter(fake_adapter("broken"))), "it is broken")
            await client.unload_adapter(fake_adapter("text").digest)
            assert adapters.forgotten == [fake_adapter("text").digest]
            await server.close()
            with_error(await outcome(client.load_adapter(fake_adapter("text"))), "engine")
        finally:
            await client.close()
            engine.close(EngineDeadError("over"))

    asyncio.run(scenario())


async def outcome(call) -> object:
    try:
        return await asyncio.wait_for(call, FAR_S)
    except Exception as error:
        return error


def with_error(found: object, text: str) -> None:
    assert isinstance(found, Exception), found
    assert text in str(found)
