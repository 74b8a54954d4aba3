"""A newcomer's prompt inside the running step, counted in steps, on the fake runner."""

from __future__ import annotations

import random

import msgspec
import pytest
from support.fake_runner import expected_token_ids, fake_image
from support.flooded import BLOCKS, PLACES, at_any_size, by_tokens, flooded, request_of
from support.scheduler_bench import Bench

from vlmserve.models.batch import ImageSpan, PoolSizes, StepBatch


def arrive(bench: Bench, *requests) -> StepBatch | None:
    """One step of the bench, in which these requests arrive; returns what was computed inside."""
    batch = bench.plan()
    assert batch is not None
    for request in requests:
        bench.add(request)
    inserted = bench.insert()
    bench.finish(batch)
    return inserted


def test_row_70_a_prompt_that_arrives_in_a_step_of_a_flood_gets_its_token_before_the_step_ends():
    """It waited for the end of the step, and half of a step is more than a short prompt."""
    bench = flooded(**PLACES, seconds_of=by_tokens)
    for number in range(8):
        name = f"small {number}"
        batch = bench.plan()
        bench.add(request_of(name, "other", max_tokens=1 + 2 * (number % 2)))
        inserted = bench.insert()
        assert [row.request_id for row in inserted.sequences] == [name]
        bench.take_inserted()
        assert len(bench.tokens[name]) == 1
        bench.finish(batch)
        while name not in bench.endings:
            bench.step()
        for _ in range(3):
            bench.step()
    assert_as_expected(bench)


# Sixteen prompts of four tokens: a step's whole budget, and no step of that size was measured.
FIRST = {"pools": PoolSizes(8192, 8, 4), "max_num_seqs": 16, "max_num_batched_tokens": 64}


def before_first_step() -> Bench:
    """A bench with a flood of one owner that has computed nothing yet."""
    bench = Bench(max_model_len=400, **FIRST, seconds_of=by_tokens)
    for number in range(300):
        bench.add(request_of(f"flood {number}", "flooder", max_tokens=300))
    return bench


def test_row_70_a_prompt_that_arrives_in_the_first_step_of_a_flood_is_inserted():
    """The step's time was not known and its budget was full, so the prompt waited for its end."""
    bench = before_first_step()
    batch = bench.plan()
    assert batch.num_tokens == FIRST["max_num_batched_tokens"]
    bench.add(request_of("small", "other", num_prompt=8, max_tokens=1))
    assert bench.insert() is not None
    bench.finish(batch)
    assert bench.endings["small"] == "length"
    assert_as_expected(bench)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (request_of("x", "other", num_prompt=9), "a full step leaves room for an eighth of it"),
        (
            request_of("x", "other", num_prompt_logprobs=0),
            "log-probabilities of a prompt take memory that a full step does not leave",
        ),
    ],
)
def test_other_prompts_wait_for_the_first_step_of_a_flood(request_, reason):
    bench = before_first_step()
    assert arrive(bench, request_) is None, reason
    bench.step()
    assert_as_expected(bench)


def test_a_step_of_an_unknown_time_that_is_not_many_times_as_long_is_waited_for():
    bench = Bench(max_model_len=400, **FIRST, seconds_of=by_tokens)
    for number in range(6):
        bench.add(request_of(f"a {number}", "a", num_prompt=4, max_tokens=30))
    batch = bench.plan()
    assert batch.num_tokens == 24
    bench.add(request_of("four", "b", num_prompt=4))
    assert bench.insert() is None
    bench.add(request_of("three", "c", num_prompt=3))
    bench.finish(batch)


def num_inside(bench: Bench, num_new: int, max_tokens: int) -> tuple[int, int]:
    """New owners ask during one step: how many prompts it inserts, and how many tokens it has."""
    batch = bench.plan()
    for number in range(num_new):
        bench.add(request_of(f"new {number}", f"owner {number}", max_tokens=max_tokens))
    num_inserted = 0
    while bench.insert() is not None:
        assert bench.scheduler.insert() is None, "the last one has no result yet"
        bench.take_inserted()
        num_inserted += 1
    bench.finish(batch)
    return num_inserted, batch.num_tokens


def test_several_newcomers_are_inserted_into_one_long_step_up_to_half_of_its_tokens():
    """Each of them but one waited for the whole step."""
    bench = before_first_step()
    num_inserted, num_tokens = num_inside(bench, 12, max_tokens=1)
    assert num_tokens == 64
    assert num_inserted == 8
    ended = [name for name in bench.endings if name.startswith("new")]
    assert len(ended) == 8
    assert_as_expected(bench)


@pytest.mark.parametrize(("seconds", "num_expected"), [(0.25, 4), (0.1, 10)])
def test_newcomers_inside_a_step_take_together_no_longer_than_it_takes(seconds, num_expected):
    """Where times are measured, they decide, not the tokens."""
    bench = before_first_step()
    bench.seconds_of = lambda batch: 1.0 if batch.num_tokens == 64 else seconds
    for num_tokens in (4, 4, 64, 64):
        bench.scheduler._step_times.record(num_tokens, 1.0 if num_tokens == 64 else seconds)
    assert num_inside(bench, 12, max_tokens=1) == (num_expected, 64)
    assert_as_expected(bench)


def test_row_70_an_owner_that_asks_again_during_a_long_step_is_inserted_again():
    """Its first prompt put it behind the flood that waits, so its second waited for the step."""
    bench = before_first_step()
    batch = bench.plan()
    for number in range(3):
        bench.add(request_of(f"small {number}", "other", max_tokens=1))
        inserted = bench.insert()
        assert inserted is not None
        assert [row.request_id for row in inserted.sequences] == [f"small {number}"]
        bench.take_inserted()
    bench.finish(batch)
    assert_as_expected(bench)


def test_an_owner_far_ahead_of_its_turn_is_not_inserted():
    """Else an owner of small weight would get half of every step."""
    bench = before_first_step()
    batch = bench.plan()
    bench.add(request_of("small", "other", max_tokens=1))
    bench.scheduler.owners.charge("other", batch.num_tokens + 1)
    assert bench.insert() is None
    bench.finish(batch)
    assert_as_expected(bench)


def test_newcomers_inside_a_step_leave_a_flood_as_many_places_as_each_of_them_has():
    """All were compared with the places before the first: the flood lost every place but one."""
    places = {**FIRST, "max_num_seqs": 4}
    bench = Bench(max_model_len=400, **places, seconds_of=by_tokens)
    for number in range(20):
        bench.add(request_of(f"flood {number}", "flooder", num_prompt=16, max_tokens=300))
    num_inserted, _ = num_inside(bench, 12, max_tokens=30)
    assert num_inserted == 3
    num_preemptions = bench.scheduler.counts().num_preemptions
    names = [row.request_id for row in bench.step().sequences]
    assert len(names) == 4
    assert sum(name.startswith("flood") for name in names) == 1
    assert bench.scheduler.counts().num_preemptions == num_preemptions + 3


def test_insertions_add_no_step_and_take_no_token_from_a_flood():
    """The flood's tokens a step, over its whole answers, with and without another owner inside."""

    def num_steps_of_flood(num_new: int) -> tuple[int, int]:
        bench = Bench(max_model_len=400, **{**PLACES, "max_num_seqs": 17}, seconds_of=by_tokens)
        for number in range(16):
            bench.add(request_of(f"flood {number}", "flooder", max_tokens=100))
        num_steps = num_inserted = 0
        while not all(f"flood {number}" in bench.endings for number in range(16)):
            batch = bench.plan()
            num_steps += 1
            if num_steps % 4 == 0 and num_inserted < num_new:
                bench.add(request_of(f"new {num_steps}", "other", max_tokens=1))
                num_inserted += bench.insert() is not None
            bench.finish(batch)
        return num_steps, num_inserted

    alone, _ = num_steps_of_flood(0)
    beside, num_inserted = num_steps_of_flood(20)
    assert num_inserted == 20
    assert beside == alone


def assert_as_expected(bench: Bench) -> None:
    for name, tokens in bench.tokens.items():
        if tokens:
            sequence = bench.sequences[name]
            request = msgspec.structs.replace(
                sequence.request, max_tokens=len(tokens), sampling=sequence.sampling
            )
            assert tokens == expected_token_ids(request, repeats=bench.repeats), name


def test_what_was_inserted_takes_a_place_when_the_next_step_is_planned():
    bench = flooded(**PLACES, seconds_of=by_tokens)
    num_preemptions = bench.scheduler.counts().num_preemptions
    assert arrive(bench, request_of("small", "other", max_tokens=30)) is not None
    assert bench.scheduler.num_running == PLACES["max_num_seqs"] + 1
    batch = bench.step()
    assert len(batch.sequences) <= PLACES["max_num_seqs"]
    assert "small" in [row.request_id for row in batch.sequences]
    assert bench.scheduler.counts().num_preemptions == num_preemptions + 1


def test_one_that_has_ended_inside_the_step_preempts_nothing():
    bench = flooded(**PLACES, seconds_of=by_tokens)
    num_preemptions = bench.scheduler.counts().num_preemptions
    assert arrive(bench, request_of("small", "other", max_tokens=1)) is not None
    assert bench.endings["small"] == "length"
    bench.step()
    assert bench.scheduler.counts().num_preemptions == num_preemptions


def test_each_step_has_at_most_one_newcomer_inside_or_before_it():
    bench = flooded(**PLACES, seconds_of=by_tokens)
    for number in range(200):
        bench.add(request_of(f"new {number}", f"owner {number}", max_tokens=1))
    num_prompts = num_steps = 0
    while not all(bench.tokens[f"new {number}"] for number in range(200)):
        batch = bench.plan()
        num_prompts += (inserted := bench.insert()) is not None
        assert bench.scheduler.insert() is None
        is_alone = len(batch.sequences) == 1
        assert not (is_alone and inserted), "nothing is inserted into a newcomer's own step"
        num_prompts += is_alone
        num_steps += not is_alone
        bench.finish(batch)
    assert num_prompts <= num_steps + 1
    assert num_prompts > 10


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (request_of("x", "flooder"), "its owner runs others"),
        (request_of("x", "other", num_prompt=60), "with the step it has more than a step's tokens"),
        (request_of("x", "other", num_prompt=17), "it takes more than half as long as both"),
        (
            request_of("x", "other", images=[fake_image("new")], spans=[ImageSpan(1)]),
            "its picture is not encoded",
        ),
    ],
)
def test_other_requests_wait_for_the_next_step(request_, reason):
    bench = flooded(**PLACES, seconds_of=by_log)
    assert arrive(bench, request_) is None, reason
    bench.step()
    assert_as_expected(bench)


def by_log(batch) -> float:
    """As `by_tokens`, but 16 tokens and more take more than half as long as 64."""
    return 0.001 if batch.num_tokens < 16 else 0.002 if batch.num_tokens < 30 else 0.003


def test_nothing_is_inserted_where_all_steps_take_as_long():
    bench = flooded(**PLACES, seconds_of=at_any_size)
    for n in range(4):
        arrive(bench, request_of(f"a{n}", f"o{n}", max_tokens=1))
    while not all(bench.tokens[f"a{n}"] for n in range(4)):
        bench.step()
    assert arrive(bench, request_of("small", "other")) is None


def test_without_free_blocks_nothing_is_inserted_and_the_request_is_next():
    bench = flooded(**BLOCKS, seconds_of=by_tokens)
    while bench.scheduler.blocks.text_pool.can_allocate(2 * bench.scheduler.num_running + 1):
        bench.step()
    assert arrive(bench, request_of("small", "other", max_tokens=1)) is None
    for _ in range(2):
        bench.step()
    assert bench.tokens["small"]


def test_an_inserted_step_that_fails_ends_its_request_alone():
    bench = flooded(**PLACES, seconds_of=by_tokens)
    batch = bench.plan()
    bench.add(request_of("small", "other"))
    assert bench.scheduler.insert() is not None
    (failed,) = bench.scheduler.fail_step(is_inserted=True)
    assert failed.sequence_id == "small"
    bench.finish(batch)
    for _ in range(5):
        bench.step()
    assert_as_expected(bench)


def test_a_step_that_fails_ends_nothing_that_was_inserted():
    bench = flooded(**PLACES, seconds_of=by_tokens)
    batch = bench.plan()
    bench.add(request_of("small", "other", max_tokens=4))
    assert bench.insert(is_late=True) is not None
    bench.fail(batch, is_computed=False)
    while "small" not in bench.endings:
        bench.step()
    assert_as_expected(bench)


@pytest.mark.parametrize("seed", range(12))
def test_random_requests_inserted_into_random_steps_answer_as_alone(seed):
    """Pictures, several answers, cancels and preemptions, with poisoned freed blocks."""
    rng = random.Random(seed)
    bench = Bench(
        pools=PoolSizes(rng.choice([64, 96]), 8, 4),
        max_num_seqs=rng.choice([4, 6]),
        max_num_batched_tokens=rng.choice([36, 64]),
        num_image_layers=rng.choice([1, 3]),
        image_cost_tokens=rng.choice([0, 6]),
        seconds_of=by_tokens,
        poison_freed_blocks=True,
        num_speculative_tokens=rng.choice([0, 3]),
        repeats=True,
    )
    for number in range(200):
        batch = bench.plan()
        for place in range(rng.choice([0, 0, 1, 2])):
            bench.add(random_request(rng, f"{number} {place}"))
        if batch is None:
            continue
        bench.insert(is_late=rng.random() < 0.3)
        open_ = [name for name in bench.tokens if name not in bench.endings]
        if open_ and rng.random() < 0.2:
            bench.abort(rng.choice(open_))
        bench.finish(batch)
    bench.run()
    bench.assert_all_free()
    assert bench.num_inserted > 0
    assert_as_expected(bench)


def random_request(rng: random.Random, name: str):
    num_images = rng.choice([0, 0, 1])
    return request_of(
        name,
        rng.choice(["flooder", f"owner {name}"]),
        num_prompt=rng.choice([3, 4, 9, 20]),
        max_tokens=rng.choice([1, 4, 20]),
        images=[fake_image(f"picture {rng.randrange(4)}")] * num_images,
        spans=[ImageSpan(1)] * num_images,
        choice_ids=[f"{name} more"] if rng.random() < 0.2 else [],
    )
