"""How many drafts a step has for the times of steps, which these tests set; no clock runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vlmserve.router.scheduler.throughput import (
    NUM_REMEMBERED,
    DraftTimes,
    StepTimes,
    size_of,
)

Curve = Callable[[int], float]


def alike(num_tokens: int) -> float:
    """A device that reads weights all the time."""
    return 1.0


def linear(num_tokens: int) -> float:
    """A device that computes all the time."""
    return float(num_tokens)


def dear_below_eight(num_tokens: int) -> float:
    """A few rows cost as many times a single row; 8 or more are computed in another way."""
    return float(num_tokens) if num_tokens < 8 else 2.5


def chances_of(shares: list[float], most: int = 8) -> list[float]:
    """Of the drafts of requests with these shares of right ones."""
    return sorted((share**n for share in shares for n in range(1, most + 1)), reverse=True)


def chosen(
    curve: Curve, shares: list[float], num_steps: int = 40, times: DraftTimes | None = None
) -> list[int]:
    """The number of drafts of each step of requests with these shares."""
    times, found = times or DraftTimes(), []
    for _ in range(num_steps):
        num_drafts = times.num_worth(len(shares), chances_of(shares))
        times.record(len(shares), num_drafts, curve(len(shares) + num_drafts))
        found.append(num_drafts)
    return found


def test_a_size_is_a_power_of_two_or_half_way_to_the_next() -> None:
    sizes = sorted({size_of(count) for count in range(1, 65)})
    assert sizes == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert all(size_of(size) == size for size in sizes)
    assert size_of(11) == 8


def test_the_first_steps_have_no_drafts_and_the_next_few_ones() -> None:
    assert chosen(alike, [0.9], 12) == [0, 0, 1, 1, 2, 2, 4, 4, 6, 6, 8, 8]


def test_where_rows_cost_nothing_all_drafts_are_computed() -> None:
    times = DraftTimes()
    assert chosen(alike, [0.7], 40, times)[-1] == 2, "no more is worth a trial"
    assert chosen(alike, [0.9], 40, times)[-1] == 8
    assert chosen(alike, [0.3], 40, times)[-1] == 8
    assert chosen(alike, [0.9] * 4)[-1] == 32


def test_where_each_row_costs_the_same_there_are_no_drafts_after_the_trials() -> None:
    for shares in ([0.95], [0.8] * 4, [0.9] * 16):
        found = chosen(linear, shares, 100)
        assert not any(found[16:])
        assert 0 < sum(count > 0 for count in found) <= 14


def test_beside_many_decodes_no_further_size_is_tried_where_rows_cost_the_same() -> None:
    found = chosen(linear, [0.65] * 16, 100)
    assert sum(count > 0 for count in found) == 2, "the two that measure the first size"
    assert chosen(alike, [0.9] * 16, 100)[-1] == 16 * 8, "all sizes, where rows cost nothing"


def test_it_finds_that_eight_rows_are_cheaper_than_three() -> None:
    assert chosen(dear_below_eight, [0.9])[-1] == 8
    assert chosen(dear_below_eight, [0.95] * 2)[-1] > 6
    assert chosen(dear_below_eight, [0.4])[-1] == 0


def test_drafts_of_which_fewer_than_half_are_expected_to_count_are_not_tried() -> None:
    assert not any(chosen(alike, [0.1] * 16))
    times = DraftTimes()
    for _ in range(2):
        times.record(1, 0, 1.0)
    assert times.num_worth(1, [0.4]) == 0
    assert times.num_worth(1, [0.5]) == 1
    for _ in range(2):
        times.record(1, 1, 1.5)
    assert times.num_worth(1, [0.4]) == 0
    assert times.num_worth(1, [0.6, 0.3]) == 1
    assert times.num_worth(1, [0.9, 0.5]) == 2


def test_chances_that_were_too_high_count_for_less_until_others_are_right() -> None:
    times = DraftTimes()
    for num_drafts, seconds in ((0, 1.0), (0, 1.0), (1, 1.4), (1, 1.4)):
        times.record(1, num_drafts, seconds)
    assert times.num_worth(1, [0.6]) == 1
    for _ in range(10):
        times.record_right(2, 4.0)
    assert times.num_worth(1, [0.6]) == 0
    times.record_right(0, 0.0)  # a step without drafts
    for _ in range(20):
        times.record_right(4, 4.0)
    assert times.num_worth(1, [0.6]) == 1
    for _ in range(20):
        times.record_right(8, 4.0)
    assert times.num_worth(1, [0.4]) == 0, "they are never raised"


def test_a_gain_within_the_noise_of_the_times_is_none() -> None:
    times = DraftTimes()
    for num_drafts, seconds in ((0, 1.0), (0, 1.0), (1, 1.0), (1, 1.0)):
        times.record(1, num_drafts, seconds)
    assert times.num_worth(1, [0.04]) == 0
    assert times.num_worth(1, [0.06]) == 1


def test_the_likeliest_drafts_of_many_requests_are_computed() -> None:
    """One request repeats its text, fifteen do not: as many drafts as one request has."""

    def slowly_rising(num_tokens: int) -> float:
        return 1 + num_tokens / 64

    found = chosen(slowly_rising, [0.95] + [0.02] * 15, 100)
    assert 1 <= found[-1] <= 8


def test_a_step_that_something_held_up_changes_nothing() -> None:
    times = DraftTimes()
    before = chosen(dear_below_eight, [0.9], 40, times)[-1]
    for num_drafts in (0, 8, 8):
        times.record(1, num_drafts, 100.0)
    assert times.num_worth(1, chances_of([0.9])) == before == 8


def test_the_times_are_measured_anew_now_and_then() -> None:
    """The curve changes while no drafts pay, so that no step of other sizes would be measured."""
    times = DraftTimes()
    assert chosen(linear, [0.9], 100, times)[-1] == 0
    assert chosen(alike, [0.9], NUM_REMEMBERED, times)[-1] == 8


@pytest.mark.parametrize("num_times", [1, 2])
def test_a_size_is_known_after_two_steps_and_its_slow_first_does_not_count(num_times: int) -> None:
    times = StepTimes()
    for seconds in [9.0, 1.0][:num_times]:
        times.record(10, seconds)
    assert times.seconds(11) == (None if num_times == 1 else 1.0)
    assert times.seconds(12) is None


def test_three_quarters_as_long_is_measured_by_size() -> None:
    times = StepTimes()
    assert not times.is_shorter(4, 20)
    times.record(20, 2.0)
    assert times.is_shorter(4, 20), "to measure it"
    times.record(4, 1.6)
    assert not times.is_shorter(4, 23)
    times.record(4, 0.9)
    assert times.is_shorter(5, 60)
