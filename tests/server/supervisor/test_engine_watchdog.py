"""When an engine counts as hung, how a step shows progress, and when restarts are given up."""

import asyncio
import os

import pytest
from support.fake_clock import Clock, first_reason
from support.fake_runner import FakeRunner

from vlmserve.models.batch import ImageToEncode, ScheduledSequence, StepBatch
from vlmserve.router.client.engine_client import EngineClient
from vlmserve.router.config import EngineConfig
from vlmserve.router.engine.step_watchdog import StepWatchdog
from vlmserve.router.messages import EngineReady
from vlmserve.server.cli.listener import listen
from vlmserve.server.settings import ServerSettings
from vlmserve.server.supervisor.engine_watchdog import EngineWatchdog
from vlmserve.server.supervisor.restart_budget import RestartBudget
from vlmserve.server.supervisor.settings import EngineTimeouts, SupervisorSettings
from vlmserve.server.supervisor.supervisor import Supervisor

READY = EngineReady(
    pid=1, max_model_len=1, vocab_size=1, max_num_seqs=1, device="", dtype="",
    num_text_tokens=1, num_image_tiles=1,
)  # fmt: skip


def watched(**heartbeat) -> tuple[EngineClient, EngineWatchdog]:
    client = EngineClient("unused")
    client.info, client.last_heartbeat = READY, 1.0
    for name, value in heartbeat.items():
        setattr(client, name, value)
    limits = EngineTimeouts(heartbeat_s=10, loading_s=300, step_s=10, first_step_s=600)
    return client, EngineWatchdog(client, limits)


def test_an_engine_without_a_heartbeat_hangs_after_10_s():
    _, watch = watched()
    (when, reason) = first_reason(watch, 60)
    assert when == pytest.approx(10, abs=1)
    assert reason.startswith("gave no heartbeat for")


class SilentClient(EngineClient):
    """Connected to an engine that is ready and says nothing more."""

    def __init__(self):
        super().__init__("unused")
        self.info, self.last_heartbeat = READY, 1.0

    @property
    def is_connected(self):
        return True


@pytest.mark.parametrize("is_held_up", [False, True])
def test_silence_is_counted_by_the_clock_but_for_what_the_watch_itself_slept_through(is_held_up):
    """Looks are an interval apart; of a longer pause two intervals count."""
    interval_s, limit_s = 1 / 1024, 64 / 1024
    num_looks = 0

    def clock():
        nonlocal num_looks
        num_looks += 1
        return num_looks * interval_s + (3600.0 if is_held_up and num_looks > 8 else 0.0)

    limits = EngineTimeouts(heartbeat_s=limit_s)
    watch = EngineWatchdog(SilentClient(), limits, interval_s=interval_s, clock=clock)
    reason = asyncio.run(watch.until_it_hangs())
    assert reason.startswith("gave no heartbeat for")
    # One before the first interval, one finds the heartbeat, and the last is past the limit.
    assert num_looks == 67 - is_held_up


def test_an_engine_that_beats_does_not_hang_whatever_it_computes():
    client, watch = watched()
    for number in range(1000):
        client.last_heartbeat, client.step_age_s = number, number
        assert watch.judge(0.5) is None


def test_a_loading_engine_may_be_silent_for_long_but_not_for_ever():
    client, watch = watched(info=None)
    assert first_reason(watch, 290) is None
    assert first_reason(watch, 60) is not None
    client.last_heartbeat = 2.0
    assert watch.judge(0.5) is None


@pytest.mark.parametrize(("stall_s", "may_compile", "hangs"), [
    (9.0, False, False), (11.0, False, True), (590.0, True, False), (610.0, True, True),
])  # fmt: skip
def test_a_step_without_progress_hangs_and_one_that_may_compile_has_longer(
    stall_s, may_compile, hangs
):
    _, watch = watched(stall_s=stall_s, may_compile=may_compile)
    assert (watch.judge(0.1) is not None) == hangs


def a_step(num_tokens=1, image=None) -> StepBatch:
    sequence = ScheduledSequence("r", [1] * num_tokens, 0, [0], [])
    images = [] if image is None else [ImageToEncode(image, [0])]
    return StepBatch([sequence], images)


def test_a_step_that_begins_layers_is_old_and_not_stalled():
    """A huge prompt on a slow machine takes minutes; what tells it from a hang is its layers."""
    runner, clock = FakeRunner(), Clock()
    watch = StepWatchdog(lambda: runner.num_layers_started, clock)
    watch.begin(a_step())
    for _ in range(100):
        clock.now += 3
        runner.num_layers_started += 1
        assert watch.stall_s == 0
    assert watch.age_s == 300
    clock.now += 7
    assert watch.stall_s == 7
    watch.end(is_computed=True)
    assert (watch.age_s, watch.stall_s) == (0, 0)


def test_a_step_may_compile_until_one_of_its_kind_was_computed():
    watch = StepWatchdog(lambda: 0, Clock())
    assert not watch.is_first_of_kind
    for num_tokens in (1, 9):
        for is_computed, is_first in ((False, True), (True, True), (True, False)):
            watch.begin(a_step(num_tokens))
            assert watch.is_first_of_kind == is_first
            watch.end(is_computed=is_computed)


def test_a_step_of_the_model_counts_its_layers_and_those_of_the_vision_encoder():
    from support import oracle as models

    runner = models.runner("tiny")
    config, before = runner.config, runner.num_layers_started
    models.generate(runner, [models.prompt("r", "a|b", [models.image(1, 1)])], 1, chunk=8)
    vision = config.vision_config.num_hidden_layers + config.vision_config.num_global_layers
    num_layers = config.text_config.num_hidden_layers + vision
    assert runner.num_layers_started - before == num_layers


def test_restarts_come_further_and_further_apart_and_then_not_at_all():
    clock = Clock()
    budget = RestartBudget(5, 300, clock)
    pauses = []
    for _ in range(6):
        pauses.append(budget.pause_s(has_served=False))
        clock.now += 1
    assert pauses == [0.5, 1, 2, 4, 8, None]


def test_a_child_that_had_served_is_started_again_at_once():
    budget = RestartBudget(5, 300, Clock())
    served = (True, False, False, True, False, True)
    assert [budget.pause_s(has_served=one) for one in served] == [0, 0.5, 1, 0, 0.5, None]


def test_restarts_of_long_ago_are_forgotten():
    clock = Clock()
    budget = RestartBudget(2, 300, clock)
    for _ in range(50):
        assert budget.pause_s(has_served=True) == 0
        clock.now += 300
    assert [budget.pause_s(has_served=True) for _ in range(3)] == [0, 0, None]


def test_many_restarts_pause_no_longer_than_half_a_minute():
    budget = RestartBudget(10_000, 300, Clock())
    assert max(budget.pause_s(has_served=False) for _ in range(5000)) == 30


# Says that it has loaded to the first who connects, and dies by a signal.
SHORT_LIVED_ENGINE = """
import os, signal, socket, sys
from vlmserve.router.processes import wire
from vlmserve.router.messages import EngineReady
from vlmserve.router.engine.process import read_config

config = read_config()
os.path.exists(config.socket_path) and os.unlink(config.socket_path)
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(config.socket_path)
    listener.listen()
    caller, _ = listener.accept()
    ready = EngineReady(
        pid=1, max_model_len=1, vocab_size=1, max_num_seqs=1, device="", dtype="",
        num_text_tokens=1, num_image_tiles=1,
    )
    caller.sendall(wire.encode_frame(ready))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_an_engine_that_dies_as_soon_as_it_is_ready_has_been_ready(capfd):
    """Once the server gave up: it had looked for the engine's readiness four times a second."""
    with listen("127.0.0.1", 0) as listener:
        supervisor = Supervisor(
            EngineConfig(model="fake", socket_path="", parent_pid=os.getpid()),
            ServerSettings(model="fake", engine_socket="", served_model_names=["fake"]),
            listener,
            lambda infos: None,
            SupervisorSettings(
                num_workers=0,
                max_restarts=2,
                has_standby=False,
                engine_command=("-c", SHORT_LIVED_ENGINE),
            ),
        )
        assert asyncio.run(asyncio.wait_for(supervisor.run(), 120)) == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        *["vlmserve: the engine ended (signal SIGKILL); starting another now"] * 2,
        "vlmserve: the engine ended 3 times in 300 s, last by signal SIGKILL: giving up",
    ]
