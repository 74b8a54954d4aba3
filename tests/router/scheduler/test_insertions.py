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
    num_inserted = 0
    for number in range(200):
        batch = bench.plan()
        for place in range(rng.choice([0, 0, 1, 2])):
            bench.add(random_request(rng, f"{number} {place}"))
        if batch is None:
            continue
        num_inserted += bench.insert(is_late=rng.random() < 0.3) is not None
        open_ = [name for name in bench.tokens if name not in bench.endings]
        if open_ and rng.random() < 0.2:
            bench.abort(rng.choice(open_))
        bench.finish(batch)
    bench.run()
    bench.assert_all_free()
    assert num_inserted > 0
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
