"""Several engines behind one server: who gets a request, and what one engine's death costs."""

import asyncio
import contextlib
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.engine_side import engine_at
from support.fake_runner import FakeRunner, fake_adapter, fake_image
from support.invariants import CHAT, SLACK, Standing, assert_error, assert_stream_error, body_for

from vlmserve.models.batch import AdapterInfo, ImageSpan
from vlmserve.models.distributed.replica import Replica
from vlmserve.models.errors import ModelError
from vlmserve.models.memory.available import (
    AvailableMemory,
    EngineMemory,
    equal_part,
    memory_of_engines,
)
from vlmserve.models.settings.runner_config import RunnerConfig
from vlmserve.router.client.engine_client import EngineClient, HealthThresholds
from vlmserve.router.client.replica_chooser import (
    Affinities,
    Load,
    ReplicaChooser,
    affinity_keys,
    margin_of,
)
from vlmserve.router.client.replica_pool import ReplicaPool, sum_of
from vlmserve.router.config import EngineConfig
from vlmserve.router.errors import (
    AdapterUnusableError,
    EngineDeadError,
    InvalidRequestError,
    QueueFullError,
)
from vlmserve.router.messages import AddRequest, EngineReady, EngineStats, SequenceOutput

READY = EngineReady(
    pid=1, max_model_len=100, vocab_size=9, max_num_seqs=8, device="", dtype="",
    num_text_tokens=100, num_image_tiles=4,
)  # fmt: skip


def request_of(tokens=(1, 2, 3), images=(), tenant="", request_id="a", adapter=None) -> AddRequest:
    return AddRequest(
        request_id=request_id, prompt_token_ids=list(tokens), images=list(images),
        spans=[ImageSpan(0) for _ in images], tenant=tenant, max_tokens=4, adapter=adapter,
    )  # fmt: skip


# Whose turn it is


def test_equals_take_turns():
    chooser = ReplicaChooser(range(3), first=1)
    assert [chooser.choose([], range(3), 1) for _ in range(6)] == [1, 2, 0, 1, 2, 0]


def test_replicas_that_are_idle_again_take_turns():
    """What was left of weights that were added and subtracted kept all requests on one of them."""
    chooser = ReplicaChooser(range(3))
    for number in (0, 1):
        load = chooser.loads[number]
        for weight in (0.1, 0.2, -0.3, -0.1, 0.1):
            load.own += weight
        assert load.own != 0
    assert sorted(chooser.choose([], range(3), 1.0) for _ in range(3)) == [0, 1, 2]


def test_the_least_loaded_is_chosen_and_only_of_those_that_are_able():
    chooser = ReplicaChooser(range(3))
    for number, load in enumerate([3, 1, 2]):
        chooser.loads[number].report(load)
    assert chooser.choose([], range(3), 1) == 1
    assert chooser.choose([], [0, 2], 1) == 2
    assert chooser.choose([], [], 1) is None


@pytest.mark.parametrize(("lead", "again"), [(0, True), (2, True), (3, False)])
def test_a_request_goes_where_it_went_before_unless_that_is_more_loaded_than_the_margin(
    lead, again
):
    chooser = ReplicaChooser(range(2))
    assert chooser.choose([b"k"], [0, 1], 2) == 0
    chooser.loads[0].report(lead)
    assert chooser.choose([b"k"], [0, 1], 2) == (0 if again else 1)
    # Where it went last is where it goes next.
    chooser.loads[0].report(0)
    assert chooser.choose([b"k"], [0, 1], 2) == (0 if again else 1)


def test_what_died_has_forgotten_everything_and_takes_part_again():
    chooser = ReplicaChooser(range(2))
    chooser.choose([b"k"], [0], 1)
    chooser.loads[0].report(5)
    chooser.died(0)
    assert chooser.affinities.find([b"k"]) is None
    assert chooser.loads[0].now == 0
    assert chooser.choose([b"k"], [1], 1) == 1
    chooser.loads[1].report(1)
    assert chooser.choose([b"other"], [0, 1], 1) == 0


@given(st.lists(st.integers(0, 5), max_size=200))
def test_replicas_are_never_further_apart_than_the_margin_and_one(keys):
    """Whatever is asked for again and again, nobody starves and nobody is swamped."""
    chooser, margin = ReplicaChooser(range(3)), 2.0
    for key in keys:
        before = [load.now for load in chooser.loads.values()]
        chosen = chooser.choose([bytes([key])], range(3), margin)
        assert before[chosen] <= min(before) + margin
        chooser.loads[chosen].own += 1
    loads = [load.now for load in chooser.loads.values()]
    assert max(loads) - min(loads) <= margin + 1


@given(st.lists(st.binary(max_size=1), max_size=100), st.integers(1, 5))
def test_affinities_are_bounded_and_the_last_ones_are_kept(keys, limit):
    affinities = Affinities(limit)
    for number, key in enumerate(keys):
        affinities.record([key], number)
        assert len(affinities) <= limit
    last = {key: number for number, key in enumerate(keys)}
    for key in sorted(last, key=lambda key: last[key])[-limit:]:
        assert affinities.find([key]) == last[key]


def test_a_load_is_what_was_told_and_what_has_changed_since():
    load = Load(own=2, own_answers=2)
    load.report(7)
    assert load.now == 7
    load.own, load.own_answers = 4, 4
    assert load.now == 9
    load.own = load.own_answers = 0
    assert load.now == 5


# What a request is known by


def test_a_longer_turn_is_known_by_the_beginning_of_the_one_before():
    first = affinity_keys(request_of(range(200)))
    second = affinity_keys(request_of(range(300)))
    assert len(first) == 2
    assert second[1:] == first
    assert affinity_keys(request_of(range(63))) == []
    assert affinity_keys(request_of([9, *range(1, 200)]))[-1] != first[-1]


def test_requests_are_known_by_their_first_image_and_tenants_are_kept_apart():
    one, other = fake_image("one"), fake_image("other")
    seen = affinity_keys(request_of(images=[one, other]))
    assert seen == affinity_keys(request_of([5], images=[one]))
    assert seen != affinity_keys(request_of(images=[other, one]))
    assert seen != affinity_keys(request_of(images=[one, other], tenant="t"))
    assert set(affinity_keys(request_of(range(99)))).isdisjoint(
        affinity_keys(request_of(range(99), tenant="t"))
    )


def test_requests_of_an_adapter_are_known_by_it_too():
    french, german = fake_adapter("french"), fake_adapter("german")
    short = affinity_keys(request_of(adapter=french))
    assert short == affinity_keys(request_of([9], tenant="t", adapter=french))
    assert len(short) == 1
    long = affinity_keys(request_of(range(200), adapter=french))
    assert long[-1:] == short
    assert set(long).isdisjoint(affinity_keys(request_of(range(200))))
    assert set(long).isdisjoint(affinity_keys(request_of(range(200), adapter=german)))
    picture = affinity_keys(request_of(images=[fake_image("one")], adapter=french))
    assert picture[1:] == short


# One face for several clients


class ScriptedClient(EngineClient):
    """A client that answers by `script`: outputs to yield, or an error to raise."""

    def __init__(self, *script):
        super().__init__("unused")
        self.script, self.asked, self.on_asked = script, [], lambda: None
        self.info, self.last_heartbeat, self.is_there = READY, 1.0, True

    @property
    def is_ready(self):
        return self.is_there

    @property
    def heartbeat_age_s(self):
        return 0.1

    async def generate(self, *requests):
        self.asked += [one.request_id for one in requests]
        self.on_asked()
        for step in self.script:
            if isinstance(step, Exception):
                raise step
            yield step


TOKEN = SequenceOutput(request_id="a", token_ids=[1])
END = SequenceOutput(request_id="a", token_ids=[2], finish_reason="stop")
DEAD = EngineDeadError("gone")
DEAD_IN_STEP = EngineDeadError("gone")
DEAD_IN_STEP.has_started = True


async def outcome(pool, request=None):
    """The outputs, and the error that ended them or None."""
    outputs = []
    try:
        async with contextlib.aclosing(pool.generate(request or request_of())) as stream:
            async for output in stream:
                outputs.append(output)
    except Exception as error:
        return outputs, error
    return outputs, None


def pool_of(*clients):
    moves = []
    return ReplicaPool(clients, HealthThresholds(), moves.append), moves


def test_each_replica_that_is_asked_is_reported_in_the_requests_task():
    chosen = []
    clients = [ScriptedClient(FULL), ScriptedClient(TOKEN, END)]
    pool = ReplicaPool(clients, HealthThresholds(), on_chosen=chosen.append)
    asyncio.run(outcome(pool))
    assert chosen == [0, 1]


def test_a_prompt_weighs_until_its_first_output_and_an_answer_until_its_end():
    client = ScriptedClient(TOKEN, END)
    pool, _ = pool_of(client)
    load = pool.chooser.loads[0]
    # Computing it weighs as much as two answers.
    request = request_of(tokens=range(1024))

    async def scenario():
        weights = []
        client.on_asked = lambda: weights.append(load.own)
        async with contextlib.aclosing(pool.generate(request)) as stream:
            async for _ in stream:
                weights.append(load.own)
        return weights

    assert asyncio.run(scenario()) == [3.0, 1.0, 1.0]
    assert load.own == 0.0


FULL = QueueFullError("full", 9.0)


@pytest.mark.parametrize(
    ("scripts", "outputs", "error", "moves"),
    [
        ([[TOKEN, END], []], [TOKEN, END], None, []),
        ([[DEAD], [TOKEN, END]], [TOKEN, END], None, ["dead"]),
        ([[DEAD_IN_STEP], [END]], [], EngineDeadError, []),
        ([[FULL], [DEAD_IN_STEP], [END]], [], EngineDeadError, ["full"]),
        ([[TOKEN, DEAD], [END]], [TOKEN], EngineDeadError, []),
        ([[DEAD], [DEAD], [END]], [], EngineDeadError, ["dead"]),
        ([[FULL], [FULL], [END]], [END], None, ["full", "full"]),
        ([[FULL], [DEAD], [END]], [END], None, ["full", "dead"]),
        ([[FULL], [QueueFullError("full", 3.0)]], [], QueueFullError, ["full"]),
        ([[InvalidRequestError("no")], [END]], [], InvalidRequestError, []),
    ],
)
def test_a_request_moves_once_if_its_replica_dies_before_it_begins_and_past_full_queues(
    scripts, outputs, error, moves
):
    pool, told = pool_of(*(ScriptedClient(*script) for script in scripts))
    seen, end = asyncio.run(outcome(pool))
    assert (seen, told) == (outputs, moves)
    assert type(end) is (error or type(None))
    if error is QueueFullError:
        assert end.retry_after_s == 3.0
    assert all(load.now == 0 for load in pool.chooser.loads.values())
    assert pool.num_open_requests == 0


def test_a_pool_is_known_to_be_full_where_all_that_could_be_asked_are():
    late, soon = ScriptedClient(END), ScriptedClient(END)
    pool, _ = pool_of(late, soon)
    assert pool.rejection("", 0) is None
    late.rejection = lambda owner, priority: FULL
    assert pool.rejection("", 0) is None
    soon.rejection = lambda owner, priority: QueueFullError("full", 3.0)
    assert pool.rejection("", 0).retry_after_s == 3.0
    soon.is_there = False
    assert pool.rejection("", 0) is FULL
    late.is_there = False
    assert pool.rejection("", 0) is None, "that no replica is ready is another error"


def test_a_worker_that_stops_sends_nothing_to_another_replica():
    pool, told = pool_of(ScriptedClient(DEAD), ScriptedClient(END))
    pool.stop()
    _, error = asyncio.run(outcome(pool))
    assert isinstance(error, EngineDeadError)
    assert told == []


def test_a_pool_promises_the_least_and_refuses_images_that_one_replica_could_not_hold():
    small = ScriptedClient(END)
    small.info = EngineReady(
        pid=2, max_model_len=50, vocab_size=9, max_num_seqs=4, device="", dtype="",
        num_text_tokens=60, num_image_tiles=1,
    )  # fmt: skip
    pool, _ = pool_of(ScriptedClient(END), small)
    assert (pool.info.max_model_len, pool.info.num_image_tiles) == (50, 1)
    # Also while the smaller one is away.
    small.info, small.is_there = None, False
    assert (pool.info.max_model_len, pool.is_ready) == (50, True)
    _, error = asyncio.run(outcome(pool, request_of(images=[fake_image("x", 2)])))
    assert isinstance(error, InvalidRequestError)
    assert margin_of(64) == 8


def test_a_replica_that_hangs_gets_nothing_while_another_is_well():
    stuck, well = ScriptedClient(END), ScriptedClient(END)
    stuck.stall_s = 4.0
    pool, _ = pool_of(stuck, well)
    for _ in range(3):
        asyncio.run(outcome(pool))
    assert (len(stuck.asked), len(well.asked)) == (0, 3)
    assert [state.is_ready for state in pool.states()] == [False, True]
    assert pool.stall_s == 0


def test_figures_of_replicas_are_summed():
    parts = [EngineStats(num_running=1, vision_step_counts=[1, 2]), EngineStats(num_running=2)]
    total = sum_of(parts)
    assert (total.num_running, total.vision_step_counts) == (3, [1, 2])
    parts = [EngineStats(running_adapters={"a": 1}), EngineStats(running_adapters={"a": 2, "b": 1})]
    assert sum_of(parts).running_adapters == {"a": 3, "b": 1}


def test_an_adapter_is_loaded_and_unloaded_by_every_replica_that_is_ready():
    def client(answer) -> ScriptedClient:
        found = ScriptedClient()

        async def load_adapter(adapter):
            found.asked.append(adapter.name)
            if isinstance(answer, Exception):
                raise answer
            return answer

        async def unload_adapter(digest):
            found.asked.append(digest)
            if isinstance(answer, Exception):
                raise answer

        found.load_adapter, found.unload_adapter = load_adapter, unload_adapter
        return found

    async def load(*clients):
        try:
            return await pool_of(*clients)[0].load_adapter(fake_adapter("text"))
        except Exception as error:
            return error

    info, bad = AdapterInfo(4, 10, True, False), AdapterUnusableError("bad")
    away = client(info)
    away.is_there = False
    clients = [client(info), client(info), away]
    assert asyncio.run(load(*clients)) == info
    assert [one.asked for one in clients] == [["text"], ["text"], []]
    # a replica that dies reads it when it is back; a replica that cannot use it fails the call
    assert asyncio.run(load(client(info), client(DEAD))) == info
    assert asyncio.run(load(client(info), client(bad))) is bad
    assert asyncio.run(load(client(DEAD), client(DEAD))) is DEAD
    assert isinstance(asyncio.run(load(away)), EngineDeadError)
    clients = [client(info), client(DEAD), away]
    asyncio.run(pool_of(*clients)[0].unload_adapter("digest"))
    assert [one.asked for one in clients] == [["digest"], ["digest"], []]


# What an engine takes of the machine


def test_replicas_lie_one_behind_the_other_on_gpus_and_too_few_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    base = torch.device("cuda", 1)
    assert [str(Replica(i, 2, 2).device_of(base)) for i in range(2)] == ["cuda:1", "cuda:3"]
    with pytest.raises(ModelError, match="needs 6 CUDA devices; only 4 exist from cuda:1 on"):
        Replica(0, 3, 2).device_of(base)


def test_replicas_share_a_cpu_s_cores_unless_someone_said_how_many(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    config = RunnerConfig(device="cpu")
    assert Replica(0, 2).share_of(config).num_threads == 4
    assert Replica(0, 2, 2).share_of(config).num_threads == 2
    assert Replica(0, 2).share_of(RunnerConfig(device="cpu", num_threads=3)).num_threads == 3
    assert Replica(0, 2).share_of(config).num_sharers == 2


@pytest.mark.parametrize(("free", "own", "others", "part"), [
    (1000, 0, 0, 500),     # both start
    (600, 200, 200, 300),  # both have loaded
    (700, 0, 300, 500),    # the other one runs
    (300, 0, 700, 300),    # the other one took more than its part
    (0, 600, 0, 0),
])  # fmt: skip
def test_a_replica_s_part_of_the_memory_is_the_same_whenever_it_starts(free, own, others, part):
    assert equal_part(AvailableMemory(free, "x"), 2, EngineMemory(own, others)).num_bytes == part


def test_what_engines_hold_is_read_from_their_parent_s_children_of_one_name(tmp_path):
    for pid, name, parent, kb in [(5, "e", 1, 10), (6, "e", 1, 7), (7, "w", 1, 9), (8, "e", 2, 9)]:
        folder = tmp_path / "proc" / str(pid)
        folder.mkdir(parents=True)
        (folder / "status").write_text(f"Name:\t{name}\nPPid:\t{parent}\nRssAnon:\t{kb} kB\n")
    assert memory_of_engines(tmp_path, 5) == EngineMemory(10 * 1024, 7 * 1024)


def test_replicas_and_a_device_map_exclude_each_other():
    with pytest.raises(ValueError, match="--replicas gives each engine its own devices"):
        EngineConfig(model="m", socket_path="", num_replicas=2, device_map="auto")


# Real engines on real sockets


def test_load_and_open_requests_return_to_nothing_over_two_engines(tmp_path):
    async def scenario():
        paths = [tmp_path / "0.sock", tmp_path / "1.sock"]
        async with contextlib.AsyncExitStack() as stack:
            for path in paths:
                await stack.enter_async_context(engine_at(path, FakeRunner()))
            clients = [EngineClient(str(path)) for path in paths]
            for client in clients:
                await client.connect()
                await client.wait_ready(20)
                stack.push_async_callback(client.close)
            pool, _ = pool_of(*clients)
            answers = await asyncio.gather(
                *(outcome(pool, request_of(range(1, 5), request_id=str(i))) for i in range(12))
            )
            assert all(error is None and outputs for outputs, error in answers)
            assert pool.num_open_requests == 0
            assert [load.now for load in pool.chooser.loads.values() if load.own] == []

    asyncio.run(asyncio.wait_for(scenario(), 60))


# A real server, one of whose two engines is killed


def long_body(stream):
    return body_for(CHAT, max_tokens=400, stream=stream, ignore_eos=True)


@pytest.mark.slow
def test_a_killed_replica_costs_only_its_own_requests_and_comes_back(start_faulty_server, wait_for):
    server = start_faulty_server(engine={"num_replicas": 2}, server={"max_num_seqs": 64})
    standing = Standing(server, is_warm=True)

    def figure(name, replica):
        return standing.metrics()[f'vlmserve_replica_{name}{{replica="{replica}"}}']

    assert wait_for(lambda: figure("ready", 0) + figure("ready", 1) == 2)
    server.suffer("slow 0.01")
    with standing.holds(same_engine=False):
        with ThreadPoolExecutor(12) as pool:
            answers = [pool.submit(standing.post, CHAT, long_body(True)) for _ in range(12)]
            # Each took half, and every stream has begun.
            assert wait_for(lambda: [figure("requests_running", i) for i in (0, 1)] == [6, 6])
            assert wait_for(lambda: standing.metrics()["time_to_first_token_seconds_count"] >= 12)
            victim, other = standing.pids("engine")
            os.kill(victim, signal.SIGKILL)
            ends = [one.result(60 * SLACK) for one in answers]
        whole = [one for one in ends if b'"error"' not in one.body]
        cut = [one for one in ends if one not in whole]
        assert (len(whole), len(cut)) == (6, 6)
        for one in cut:
            assert_stream_error(one)
        # Greedy answers to the same prompt.
        texts = {text_of(one) for one in whole}
        assert len(texts) == 1
        assert other in standing.pids("engine")
        assert standing.get("/v1/health/ready").status == 200
        assert wait_for(lambda: figure("ready", 0) + figure("ready", 1) == 2, 30 * SLACK)
        assert wait_for(lambda: len(standing.pids("engine")) == 2)
        server.suffer("")
        steps = [figure("steps", i) for i in (0, 1)]
        for _ in range(8):
            standing.probe()
        assert wait_for(lambda: all(figure("steps", i) > steps[i] for i in (0, 1))), (
            "the one that came back takes no work"
        )
    log = server.log.read_text()
    assert "the engine of replica" in log


def text_of(answer):
    chunks = [json.loads(one) for one in answer.frames if one != "[DONE]"]
    return "".join(c["delta"].get("content") or "" for one in chunks for c in one["choices"])


@pytest.mark.slow
def test_one_replica_that_dies_too_often_rests_and_the_server_ends_only_with_all(
    start_faulty_server, wait_for
):
    server = start_faulty_server(
        engine={"num_replicas": 2}, supervision={"max_restarts": 0, "has_standby": False}
    )
    standing = Standing(server, is_warm=True)
    assert wait_for(lambda: "vlmserve is ready" in server.log.read_text())
    victim, other = standing.pids("engine")
    os.kill(victim, signal.SIGKILL)
    assert wait_for(lambda: "the other replicas keep serving" in server.log.read_text())
    assert wait_for(lambda: standing.pids("engine") == [other])
    assert standing.post(CHAT, body_for(CHAT)).status == 200
    os.kill(other, signal.SIGKILL)
    assert server.process.wait(20 * SLACK) == 1


@pytest.mark.slow
def test_queues_of_both_replicas_are_full_before_a_client_hears_429(start_faulty_server, wait_for):
    server = start_faulty_server(
        engine={"num_replicas": 2, "max_num_seqs": 1, "max_queue_requests": 1}
    )
    standing = Standing(server, is_warm=True)
    assert wait_for(lambda: standing.metrics()['vlmserve_replica_ready{replica="1"}'] == 1)
    server.suffer("slow 0.02")
    with standing.holds(), ThreadPoolExecutor(4) as pool:
        answers = []
        for number in range(4):
            answers.append(pool.submit(standing.post, CHAT, long_body(False)))
            assert wait_for(lambda number=number: num_taken(standing) == number + 1)
        assert_error(standing.post(CHAT, body_for(CHAT)), 429)
        assert all(one.result(60 * SLACK).status == 200 for one in answers)


@pytest.mark.slow
def test_what_waits_at_a_replica_that_dies_is_answered_by_another(start_faulty_server, wait_for):
    server = start_faulty_server(engine={"num_replicas": 2, "max_num_seqs": 1})
    standing = Standing(server, is_warm=True)
    assert wait_for(lambda: standing.metrics()['vlmserve_replica_ready{replica="1"}'] == 1)
    server.suffer("slow 0.01")
    with standing.holds(same_engine=False), ThreadPoolExecutor(4) as pool:
        answers = []
        for number in range(4):
            answers.append(pool.submit(standing.post, CHAT, long_body(False)))
            assert wait_for(lambda number=number: num_taken(standing) == number + 1)
        assert wait_for(lambda: standing.metrics()["time_to_first_token_seconds_count"] >= 2)
        os.kill(standing.pids("engine")[0], signal.SIGKILL)
        ends = [one.result(60 * SLACK) for one in answers]
        # One ran there and is lost; one waited there and moved.
        assert sorted(one.status for one in ends) == [200, 200, 200, 503]
        figures = standing.metrics()
        assert figures['vlmserve_replica_moves_total{reason="dead"}'] == 1
        assert figures["request_success_total"] == 3
        assert wait_for(
            lambda: standing.metrics()['vlmserve_replica_ready{replica="0"}'] == 1, 30 * SLACK
        )


@pytest.mark.slow
def test_a_request_that_kills_engines_costs_one(start_faulty_server, wait_for):
    """It was moved, as nothing had come of it, and killed the other one too."""
    server = start_faulty_server(engine={"num_replicas": 2}, supervision={"has_standby": False})
    standing = Standing(server, is_warm=True)
    assert wait_for(lambda: standing.metrics()['vlmserve_replica_ready{replica="1"}'] == 1)
    server.suffer("poison 300")
    with standing.holds(same_engine=False):
        before = set(standing.pids("engine"))
        for stream in (False, True):
            poison = body_for(CHAT, "word " * 400, stream=stream)
            assert_error(standing.post(CHAT, poison), 503)
            assert standing.post(CHAT, body_for(CHAT)).status == 200, "the other one goes on"
            assert wait_for(lambda b=before: len(b - set(standing.pids("engine"))) == 1)
            assert wait_for(lambda: len(standing.pids("engine")) == 2, 30 * SLACK)
            for number in (0, 1):
                name = f'vlmserve_replica_ready{{replica="{number}"}}'
                assert wait_for(lambda name=name: standing.metrics()[name] == 1, 30 * SLACK)
            before = set(standing.pids("engine"))
        assert standing.metrics()['vlmserve_replica_moves_total{reason="dead"}'] == 0


def num_taken(standing):
    figures = standing.metrics()
    return figures["num_requests_running"] + figures["num_requests_waiting"]


@pytest.mark.slow
@pytest.mark.parametrize("num_kills", [1, 6])
def test_two_engines_of_the_bundled_model_answer_rightly_while_one_is_killed(
    start_server, draw_picture, wait_for, num_kills
):
    server = start_server("--dtype", "float32", "--replicas", "2", "--max-restarts", "50")
    standing = Standing(server)
    assert wait_for(lambda: len(standing.pids("engine")) == 2)
    assert wait_for(lambda: standing.metrics()['vlmserve_replica_ready{replica="1"}'] == 1, 120)
    bodies = [
        body_for(CHAT, "What shape is it?", images=[draw_picture(seed).url], max_tokens=12)
        for seed in range(8)
    ]

    def said(answer):
        return answer.json["choices"][0]["message"]["content"]

    right = [said(standing.post(CHAT, body)) for body in bodies]
    assert len(set(right)) > 1
    with standing.holds(same_engine=False):
        num_failed = 0
        for number in range(num_kills):
            with ThreadPoolExecutor(8) as pool:
                answers = [pool.submit(standing.post, CHAT, body) for body in bodies * 4]
                os.kill(standing.pids("engine")[number % 2], signal.SIGKILL)
                ends = [one.result(120) for one in answers]
            for end, expected in zip(ends, right * 4, strict=True):
                if end.status == 200:
                    assert said(end) == expected
                else:
                    assert_error(end, 503)
                    num_failed += 1
            assert wait_for(lambda: len(standing.pids("engine")) == 2, 60)
            assert wait_for(
                lambda: all(
                    standing.metrics()[f'vlmserve_replica_ready{{replica="{i}"}}'] for i in (0, 1)
                ),
                120,
            )
        # At the worst all that ran where the kill fell; not all of them.
        assert num_failed < num_kills * len(bodies) * 4


def test_of_many_replicas_two_at_random_are_compared():
    """Loads stay even, and the loads of the others are not looked at."""
    chooser = ReplicaChooser(range(100))
    for _ in range(1_000):
        number = chooser.choose([], range(100), margin=1.0)
        chooser.loads[number].own += 1
    loads = [load.own for load in chooser.loads.values()]
    assert max(loads) <= 15
    assert min(loads) >= 5


def test_given_affinities_are_used_while_they_are_empty():
    affinities = Affinities(limit=1)
    chooser = ReplicaChooser(range(2), affinities=affinities)
    assert chooser.choose([b"a"], range(2), margin=1.0) == 0
    assert len(affinities) == 1


def test_choosers_that_share_nothing_agree_on_the_replica_of_a_key():
    one, other = (ReplicaChooser("abc", first=first, has_homes=True) for first in (0, 1))
    keys = [bytes([number]) for number in range(60)]
    homes = [one.choose([key], "abc", margin=100.0) for key in keys]
    assert [other.choose([key], "abc", margin=100.0) for key in reversed(keys)] == homes[::-1]
    assert all(homes.count(replica) >= 10 for replica in "abc")
    # The keys of the others stay where they are when one is gone.
    left = [ReplicaChooser("ab", has_homes=True).choose([key], "ab", 100.0) for key in keys]
    assert all(now == home for now, home in zip(left, homes, strict=True) if home != "c")
    one.loads["a"].own = 101.0
    assert "a" not in {one.choose([key], "abc", margin=100.0) for key in keys}


def test_a_replica_that_is_gone_is_forgotten_and_a_new_one_is_used():
    chooser = ReplicaChooser("ab")
    assert chooser.choose([b"key"], "ab", margin=8.0) == "a"
    chooser.loads["b"].own = 3.0
    chooser.update("bc")
    assert set(chooser.loads) == {"b", "c"}
    assert chooser.choose([b"key"], "bc", margin=8.0) == "c"
    chooser.update("abc")
    assert chooser.affinities.find([b"key"]) == "c"
    assert chooser.loads["a"].now == 0


def test_the_requests_of_others_are_added_to_ones_own():
    load = ReplicaChooser("a").loads["a"]
    load.own, load.own_answers = 2.0, 2
    load.report_others(3)
    assert load.now == 5.0
