"""When a worker counts as hung, by what comes through its pipe."""

import asyncio
import contextlib
import os

import pytest
from support.fake_clock import first_reason

from vlmserve.server.supervisor.restart_counter import FILE_NAME, RestartCounter, RestartCounts
from vlmserve.server.supervisor.settings import WorkerTimeouts
from vlmserve.server.supervisor.worker_liveness import LivenessPipe, beat
from vlmserve.server.telemetry.metrics import METRICS_FOLDER_VARIABLE, Metrics

LIMITS = WorkerTimeouts(stall_s=10, starting_s=300)


@pytest.fixture
def pulse():
    with LivenessPipe(LIMITS) as made:
        yield made


def test_a_worker_that_beats_does_not_hang(pulse):
    for _ in range(1000):
        os.write(pulse.worker_fd, b".")
        assert pulse.judge(9.0) is None


def test_a_worker_that_beats_no_more_hangs_after_10_s(pulse):
    os.write(pulse.worker_fd, b"..")
    when, reason = first_reason(pulse, 60)
    assert when == pytest.approx(10, abs=1)
    assert reason.startswith("has not run its event loop for 10 s")


def test_a_worker_may_start_for_long_but_not_for_ever(pulse):
    assert first_reason(pulse, 290) is None
    assert first_reason(pulse, 60) is not None


def test_a_late_beat_begins_the_time_anew(pulse):
    os.write(pulse.worker_fd, b".")
    assert first_reason(pulse, 9) is None
    os.write(pulse.worker_fd, b".")
    assert first_reason(pulse, 9) is None


def test_the_end_of_a_worker_is_no_beat(pulse):
    os.write(pulse.worker_fd, b".")
    assert pulse.judge(1.0) is None
    pulse.hand_over()
    assert first_reason(pulse, 60) is not None


def test_a_watch_that_was_held_up_blames_nobody():
    """As where the whole machine slept, or every process of a container was stopped."""

    class Clock:
        now = 0.0

        def __call__(self):
            self.now += 3600.0
            return self.now

    async def run():
        with LivenessPipe(LIMITS, interval_s=0.001, clock=Clock()) as pulse:
            os.write(pulse.worker_fd, b".")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(pulse.until_it_stops(), 0.1)

    asyncio.run(run())


def test_beats_go_on_into_a_pipe_that_nobody_reads_and_are_all_read_at_once(pulse):
    os.set_blocking(pulse.worker_fd, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pulse.worker_fd, b"." * 4096)

    async def run():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(beat(pulse.worker_fd, 0.001), 0.05)

    asyncio.run(run())
    assert pulse.judge(9.0) is None
    assert pulse.judge(9.0) is None
    assert pulse.judge(9.0) is not None, "all that was there was read at the first look"


def test_a_pulse_gives_its_descriptors_back():
    before = set(os.listdir("/proc/self/fd"))
    with LivenessPipe(LIMITS) as pulse:
        pulse.hand_over()
        pulse.hand_over()
    with LivenessPipe(LIMITS):
        pass
    assert set(os.listdir("/proc/self/fd")) == before


# The counts


def test_restarts_are_counted_by_process_and_reason_and_read_by_others(tmp_path):
    assert RestartCounts.read(tmp_path) == RestartCounts()
    counter = RestartCounter(tmp_path)
    counter.count_engine("hung", 1)
    for _ in range(2):
        counter.count_worker("ended")
    told = RestartCounts.read(tmp_path)
    assert told.engine == {"ended": 0, "hung": 1}
    assert told.of_replicas == {1: 1}
    assert told.worker == {"ended": 2, "hung": 0}
    assert os.listdir(tmp_path) == [FILE_NAME]


def test_a_worker_reads_the_restarts_of_each_replica(tmp_path, monkeypatch):
    monkeypatch.setenv(METRICS_FOLDER_VARIABLE, str(tmp_path))
    assert Metrics(1).restarts().of_replicas == {}
    counter = RestartCounter(tmp_path)
    for _ in range(2):
        counter.count_engine("ended", 1)
    assert Metrics(1).restarts().of_replicas == {1: 2}


def test_a_restart_that_cannot_be_written_ends_nothing(tmp_path, caplog):
    RestartCounter(tmp_path / "gone").count_engine("ended", 0)
    assert "/metrics misses a restart" in caplog.text
