"""Places that keys share: in turn, bounded, and free again whatever happens."""

import asyncio
import threading

import pytest

from vlmserve.server.admission.fair_lane import FairLane, LaneLimits
from vlmserve.server.errors import OverloadedError


class Clock:
    """Seconds that pass when a test lets them."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Work:
    """Pieces of work that end when the test says; `started` lists their names in order."""

    def __init__(self, num_places: int = 1, weights=None, **limits) -> None:
        self.clock = Clock()
        self.refusals: list[str] = []
        self.lane = FairLane(
            "image fetches",
            LaneLimits(num_places, **limits),
            clock=self.clock,
            weight_of=lambda key: (weights or {}).get(key, 1.0),
            on_refusal=self.refusals.append,
        )
        self.started: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}

    def begin(self, key: str, name: str) -> asyncio.Task:
        end = self._ends[name] = asyncio.Event()

        async def run() -> None:
            async with self.lane.place(key):
                self.started.append(name)
                await end.wait()

        return asyncio.create_task(run())

    async def end(self, name: str, after_s: float = 1.0) -> None:
        self.clock.now += after_s
        self._ends[name].set()
        await settle()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def run(scenario) -> None:
    asyncio.run(scenario())


def test_a_key_that_fills_the_lane_delays_another_by_one_piece_of_work():
    async def scenario():
        work = Work(num_places=2)
        tasks = [work.begin("flood", f"a{number}") for number in range(50)]
        await settle()
        tasks.append(work.begin("other", "b"))
        await settle()
        assert work.started == ["a0", "a1"]
        await work.end("a0")
        assert work.started == ["a0", "a1", "b"]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (work.lane.num_running, work.lane.num_waiting, work.lane.num_keys) == (0, 0, 0)

    run(scenario)


def test_keys_get_equal_time_not_equal_turns():
    async def scenario():
        work, seconds = Work(), {"long": 0.0, "short": 0.0}
        tasks = [work.begin("long", f"long {n}") for n in range(40)]
        tasks += [work.begin("short", f"short {n}") for n in range(400)]
        await settle()
        for _ in range(200):
            name = work.started[-1]
            lasts_s = 10.0 if name.startswith("long") else 1.0
            seconds[name.split()[0]] += lasts_s
            await work.end(name, lasts_s)
        assert abs(seconds["long"] - seconds["short"]) <= 20
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(scenario)


def test_a_key_that_joins_while_long_work_runs_waits_for_none_of_the_short_work_behind_it():
    """Running work was charged in advance and given back at its end. A key that joined meanwhile
    stood behind all that was given back: 20 short pieces of a key whose first two were long."""

    async def scenario():
        work = Work(num_places=2)
        tasks = [work.begin("flood", f"a{number}") for number in range(30)]
        await settle()
        for name in ("a0", "a1"):
            await work.end(name, 100.0)  # the mean is high from now on
        tasks.append(work.begin("other", "b0"))
        await settle()
        await work.end("a2", 0.01)
        assert work.started[-1] == "b0"
        await work.end("b0", 0.01)
        tasks.append(work.begin("other", "b1"))
        await settle()
        for name in ("a3", "a4"):
            await work.end(name, 0.01)
        assert "b1" in work.started
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(scenario)


def test_keys_get_time_by_their_weights():
    """A key's weight held in the engine only: before it, all keys got the same."""

    async def scenario():
        work = Work(weights={"heavy": 3.0})
        tasks = [work.begin(key, f"{key}{n}") for n in range(40) for key in ("heavy", "light")]
        await settle()
        for _ in range(32):
            await work.end(work.started[-1])
        counts = [sum(name.startswith(key) for name in work.started) for key in ("heavy", "light")]
        assert counts[0] + counts[1] == 33
        assert 23 <= counts[0] <= 26
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(scenario)


def test_the_wait_that_is_refused_counts_the_turns_of_heavier_keys():
    async def scenario():
        work = Work(weights={"heavy": 4.0}, max_wait_s=0.4)
        tasks = [work.begin("heavy", f"a{number}") for number in range(5)]
        await settle()
        # Work is taken to last 0.1 s: 1 of its own, and 4 that wait before it.
        with pytest.raises(OverloadedError) as refusal:
            await work.lane.take("light")
        assert refusal.value.retry_after_s == pytest.approx(0.5)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(scenario)


def test_inside_a_key_the_first_come_is_the_first_served():
    async def scenario():
        work = Work()
        tasks = [work.begin("a", str(number)) for number in range(5)]
        await settle()
        for number in range(5):
            await work.end(str(number))
        await asyncio.gather(*tasks)
        assert work.started == ["0", "1", "2", "3", "4"]

    run(scenario)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_waiting_by_key": 2}, "2 of this key wait"),
        ({"max_waiting": 2}, "2 wait"),
        ({"max_wait_s": 0.25}, "the limit is 0.25 s"),
    ],
)
def test_a_full_line_refuses_at_once_names_the_lane_and_is_counted(limits, reason):
    async def scenario():
        work = Work(**limits)
        tasks = [work.begin("a", str(number)) for number in range(3)]
        await settle()
        with pytest.raises(OverloadedError, match=f"image fetches: .*{reason}") as caught:
            async with work.lane.place("a"):
                pass
        assert caught.value.retry_after_s > 0
        assert work.refusals == ["image fetches"]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(scenario)


def test_a_line_that_one_key_fills_is_open_to_another():
    async def scenario():
        work = Work(max_waiting_by_key=2)
        tasks = [work.begin("a", str(number)) for number in range(3)]
        await settle()
        tasks.append(work.begin("b", "b"))
        await settle()
        await work.end("0")
        assert work.started == ["0", "b"]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(scenario)


def test_a_cancel_in_the_moment_the_place_comes_gives_it_to_the_next():
    async def scenario():
        work = Work()
        first, second, third = (work.begin("a", name) for name in ("1", "2", "3"))
        await settle()
        work._ends["1"].set()
        await asyncio.sleep(0)  # the first frees its place and gives it to the second
        second.cancel()  # its place was given, it has not run since
        await settle()
        assert work.started == ["1", "3"]
        await work.end("3")
        await asyncio.gather(first, third)
        assert second.cancelled()
        assert (work.lane.num_running, work.lane.num_waiting, work.lane.num_keys) == (0, 0, 0)

    run(scenario)


def test_work_that_fails_frees_its_place():
    async def scenario():
        work = Work()
        with pytest.raises(ValueError, match="broken"):
            async with work.lane.place("a"):
                raise ValueError("broken")
        assert (work.lane.num_running, work.lane.num_keys) == (0, 0)

    run(scenario)


def test_waiting_work_is_refused_once_it_has_waited_too_long():
    """The mean of past work says nothing of work that never ends."""

    async def scenario():
        work = Work(max_wait_s=0.15)
        endless = work.begin("a", "endless")
        await settle()
        with pytest.raises(OverloadedError, match=r"it waited 0\.15 s, the limit"):
            async with work.lane.place("b"):
                pass
        assert work.refusals == ["image fetches"]
        assert (work.lane.num_running, work.lane.num_waiting) == (1, 0)
        await work.end("endless")
        await endless
        assert work.lane.num_keys == 0

    run(scenario)


def test_later_work_of_an_admitted_request_is_not_refused_for_its_wait():
    """A request alone on a server was else refused for the time of its own pictures."""

    async def scenario():
        work = Work(max_wait_s=0.01)
        first = work.begin("a", "first")
        await settle()
        second = asyncio.create_task(work.lane.take("a", is_bounded=False))
        await settle()
        assert work.lane.num_waiting == 1
        await work.end("first")
        (await second).free()
        await first
        assert (work.lane.num_running, work.lane.num_keys, work.refusals) == (0, 0, [])

    run(scenario)


def test_a_lane_that_keeps_room_lets_a_new_key_start_at_once():
    async def scenario():
        work = Work(num_places=8, keeps_room=True)
        tasks = [work.begin("flood", f"a{number}") for number in range(20)]
        await settle()
        assert work.started == ["a0", "a1", "a2", "a3"]
        tasks += [work.begin("other", f"b{number}") for number in range(20)]
        await settle()
        assert work.started[4:] == ["b0", "b1"]
        tasks.append(work.begin("third", "c"))
        await settle()
        assert work.started[6:] == ["c"]
        await work.end("a0")  # four keep a place, so the flood waits until others have theirs
        assert "a4" not in work.started
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (work.lane.num_running, work.lane.num_waiting, work.lane.num_keys) == (0, 0, 0)

    run(scenario)


def test_a_thread_keeps_its_place_when_its_caller_leaves():
    """Else a key that cancels its requests would get any number of threads."""

    async def scenario():
        work = Work()
        go_on = threading.Event()
        caller = asyncio.create_task(work.lane.run_in_thread("a", go_on.wait))
        await settle()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert work.lane.num_running == 1
        go_on.set()
        assert await work.lane.run_in_thread("b", lambda: 7) == 7
        assert (work.lane.num_running, work.lane.num_keys) == (0, 0)

    run(scenario)


def test_an_error_in_a_thread_is_the_caller_s_and_frees_the_place():
    async def scenario():
        work = Work()
        with pytest.raises(ZeroDivisionError):
            await work.lane.run_in_thread("a", lambda: 1 // 0)
        assert (work.lane.num_running, work.lane.num_keys) == (0, 0)

    run(scenario)


def test_a_place_is_freed_once():
    async def scenario():
        work = Work(num_places=2)
        first, second = await work.lane.take("a"), await work.lane.take("a")
        first.free()
        first.free()
        assert work.lane.num_running == 1
        second.free()
        assert (work.lane.num_running, work.lane.num_keys) == (0, 0)

    run(scenario)
