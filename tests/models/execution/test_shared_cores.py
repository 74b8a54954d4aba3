"""Threads of a step beside other processes: what is tried, chosen and given back."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from support.fake_clock import Clock
from support.fake_runner import fake_image

from vlmserve.models.batch import ImageToEncode, ScheduledSequence, StepBatch
from vlmserve.models.execution.shared_cores import (
    NUM_TRIES,
    PERIOD_S,
    VALID_S,
    CoreUse,
    SharedCores,
)

# numbers of tokens and of images
DECODE, PROMPT = (1, 0), (100, 0)


def batch_of(num_tokens: int, num_images: int) -> StepBatch:
    sequence = ScheduledSequence("r", [1] * num_tokens, 0, [0], [])
    image = ImageToEncode(fake_image("picture"), [0])
    return StepBatch([sequence], [image] * num_images)


class Machine:
    """Cores of which others use some; how long steps take by threads and by what others use."""

    def __init__(self, most: int = 2, num_cores: int = 2) -> None:
        self.others = 0.0
        self.contended_s = 0.04
        self.inside_s = 0.0
        self.num_looks = 0
        self.set: list[int] = []
        self.clock = Clock()
        self.cores = SharedCores(most, num_cores, self.set.append, self._look, self.clock)

    def _look(self) -> float:
        self.num_looks += 1
        return self.others

    def step(self, kind=DECODE) -> int:
        """Compute a step; returns its threads."""
        with self.cores.step(batch_of(*kind)):
            number = self.cores.num_threads
            quiet_s, one_s = 0.01, 0.02
            several_s = quiet_s if self.others < 0.5 else self.contended_s
            self.clock.now += several_s if number > 1 else one_s
            with self.cores.left_out():
                self.clock.now += self.inside_s if number == 1 else 0.0
        return number

    def steps(self, seconds: float, kind=DECODE) -> list[int]:
        """The threads of the steps of some seconds."""
        end, threads = self.clock.now + seconds, []
        while self.clock.now < end:
            threads.append(self.step(kind))
        return threads


def test_alone_nothing_is_tried_and_the_cores_are_read_twice_a_second():
    machine = Machine()
    assert set(machine.steps(10)) == {2}
    assert machine.set == []
    assert machine.num_looks <= 10 / PERIOD_S


def test_beside_a_process_the_faster_number_is_found_and_kept():
    machine = Machine()
    machine.others = 0.7
    machine.steps(2)
    later = machine.steps(20)
    assert later.count(1) / len(later) > 0.95


def test_another_step_inside_a_step_is_not_its_time():
    machine = Machine()
    machine.others, machine.inside_s = 1.0, 0.5
    machine.steps(5)
    assert machine.step() == 1


def test_all_threads_are_kept_where_they_are_faster_beside_others():
    machine = Machine()
    machine.others, machine.contended_s = 0.7, 0.012
    machine.steps(2)
    later = machine.steps(20)
    assert later.count(2) / len(later) > 0.98


def test_the_threads_come_back_as_soon_as_the_other_process_has_ended():
    machine = Machine()
    machine.others = 1.0
    machine.steps(3)
    assert machine.step() == 1
    machine.others = 0.1
    machine.steps(PERIOD_S)
    assert set(machine.steps(3)) == {2}


def test_a_choice_is_tried_again_when_it_is_old():
    machine = Machine()
    machine.others = 0.7
    machine.steps(2)
    machine.contended_s = 0.001
    assert set(machine.steps(VALID_S / 2)) == {1}
    machine.steps(VALID_S)
    assert set(machine.steps(1)) == {2}


def test_each_kind_of_step_is_measured_by_itself():
    machine = Machine()
    machine.others = 0.7
    machine.steps(2)
    assert machine.step() == 1
    first = [machine.step(PROMPT) for _ in range(2 * NUM_TRIES)]
    assert first == [2] * NUM_TRIES + [1] * NUM_TRIES
    with_image = [machine.step((100, 1)) for _ in range(NUM_TRIES)]
    assert with_image == [2] * NUM_TRIES


@pytest.mark.parametrize(("others", "fewer"), [(0.6, 14), (1.3, 14), (4.2, 12), (40.0, 1)])
def test_of_many_cores_as_many_are_left_as_others_use(others, fewer):
    machine = Machine(most=15, num_cores=16)
    machine.others = others
    assert set(machine.steps(2)) == {15, fewer}


def test_what_others_use_is_read_without_this_process_and_without_background_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stat = tmp_path / "stat"
    seconds, own = iter([10.0, 12.0]), iter([1.0, 2.5])
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(time, "process_time", lambda: next(own))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2})
    stat.write_text("cpu 9 9 9 9 9 9 9 9 0 0\ncpu0 0 0 0 0 0 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0 0 0\n")
    use = CoreUse(stat)
    # of 2 s on two cores: 1.5 s of this process, 1 s of others; 1 s of background work, 0.5 s idle
    stat.write_text(
        "cpu0 120 100 30 50 0 0 0 0 0 0\ncpu1 200 0 0 0 0 0 0 0 0 0\ncpu2 80 0 10 0 0 5 5 0 0 0\n"
    )
    assert use.of_others() == pytest.approx(0.5)


def test_without_figures_of_the_system_nobody_else_is_seen(tmp_path: Path):
    assert CoreUse(tmp_path / "nothing").of_others() == 0.0
