"""Several answers to one prompt: computed once, apart afterwards, none lost.

With the fake runner of support/fake_runner.py, whose tokens are hashes of all that a position sees.
"""

from __future__ import annotations

import pytest
from msgspec.structs import replace
from support.fake_runner import FakeRunner, expected_token_ids, fake_image, fake_info
from support.stepped import SteppedEngine

from vlmserve.models.batch import ImageSpan, PoolSizes, SamplingParams
from vlmserve.router.messages import AddRequest


def engine_of(num_text_blocks=32, num_image_blocks=8, **limits) -> SteppedEngine:
    runner = FakeRunner(fake_info(PoolSizes(num_text_blocks, num_image_blocks, 4), 64))
    return SteppedEngine(runner, limits)


def request_of(num_prompt=10, num_choices=4, name="a", **fields) -> AddRequest:
    fields = {"max_tokens": 6, "sampling": SamplingParams(seed=5)} | fields
    return AddRequest(
        request_id=name,
        prompt_token_ids=list(range(num_prompt)),
        choice_ids=[f"{name}{choice}" for choice in range(1, num_choices)],
        **fields,
    )


def assert_each_answers_as_alone(engine: SteppedEngine, request: AddRequest) -> None:
    for request_id in request.answer_ids:
        seed = engine.sequences[request_id].sampling.seed
        alone = replace(request, sampling=SamplingParams(seed=seed))
        assert engine.generated(request_id) == expected_token_ids(alone)
    engine.assert_all_free()


@pytest.mark.parametrize("num_prompt", [1, 4, 5, 7, 8, 9])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_the_prompt_is_computed_once_and_its_last_token_for_each_answer(num_prompt, prefix_cache):
    engine = engine_of(prefix_cache=prefix_cache)
    request = request_of(num_prompt)
    engine.add(request)
    num_tokens = engine.run()
    num_decoded = 4 * (request.max_tokens - 1)
    assert num_tokens == num_prompt + 3 + num_decoded
    assert_each_answers_as_alone(engine, request)


def test_the_images_are_encoded_and_stored_once():
    engine = engine_of(num_image_blocks=4)
    request = request_of(images=[fake_image("p", 4)], spans=[ImageSpan(2)])
    engine.add(request)
    engine.run()
    assert engine.runner.num_images_encoded == 1
    assert engine.scheduler.snapshot().images.num_hits == 0
    assert_each_answers_as_alone(engine, request)


def test_choices_draw_from_streams_of_their_own_and_the_first_from_the_requests():
    engine = engine_of()
    engine.add(request_of(num_choices=3))
    seeds = [one.sampling.seed for one in engine.sequences.values()]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3
    again = engine_of()
    again.add(request_of(num_choices=2))
    assert [one.sampling.seed for one in again.sequences.values()] == seeds[:2]


@pytest.mark.parametrize("limits", [{"max_num_seqs": 2}, {"num_text_blocks": 5}])
def test_answers_without_room_wait_and_come_out_the_same(limits):
    engine = engine_of(**limits)
    request = request_of()
    engine.add(request)
    engine.run()
    assert_each_answers_as_alone(engine, request)


def test_a_first_answer_of_one_token_leaves_its_prompt_to_the_others():
    engine = engine_of()
    request = request_of(max_tokens=1)
    engine.add(request)
    assert engine.run() == 10 + 3
    assert_each_answers_as_alone(engine, request)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3])
def test_the_others_go_on_when_the_first_is_aborted(num_steps):
    engine = engine_of(max_num_batched_tokens=4)
    request = request_of()
    engine.add(request)
    for _ in range(num_steps):
        engine.step()
    engine.abort("a")
    engine.run()
    for request_id in request.choice_ids:
        assert len(engine.generated(request_id)) == 6
    engine.assert_all_free()


@pytest.mark.parametrize("num_steps", [0, 1, 3, 5])
def test_one_of_the_others_is_aborted_alone(num_steps):
    engine = engine_of(max_num_batched_tokens=4)
    engine.add(request_of())
    for _ in range(num_steps):
        engine.step()
    engine.abort("a2")
    engine.run()
    assert [len(engine.generated(name)) for name in ("a", "a1", "a3")] == [6, 6, 6]
    assert len(engine.generated("a2")) < 6
    engine.assert_all_free()


def test_nothing_is_copied_for_an_answer_that_left_before_it_ran():
    engine = engine_of()
    engine.add(request_of())
    engine.step()
    engine.abort("a2")
    batch = engine.scheduler.schedule()
    assert len(batch.copies) == 2
    engine.scheduler.update(engine.runner.execute(batch))
    engine.run()
    engine.assert_all_free()


def test_a_fork_leaves_each_that_runs_a_block_to_grow_into():
    """The prompt fills two of four blocks: the first answer's next token needs a third."""
    engine = engine_of(num_text_blocks=4)
    request = request_of(num_prompt=8, num_choices=3)
    engine.add(request)
    engine.step()
    assert engine.scheduler.num_running == 2
    engine.step()
    assert engine.scheduler.snapshot().num_preemptions == 0
    engine.run()
    assert_each_answers_as_alone(engine, request)


def test_a_failed_step_ends_who_was_in_it_and_the_rest_compute_what_it_should_have_copied():
    engine = engine_of(max_num_batched_tokens=3)
    request = request_of(num_prompt=3)
    engine.add(request)
    engine.step()
    batch = engine.scheduler.schedule()
    assert len(batch.copies) == 3
    failed = {one.request_id for one in engine.scheduler.fail_step()}
    engine.scheduler.check()
    engine.run()
    survivors = {"a", "a1", "a2", "a3"} - failed
    assert survivors
    for request_id in survivors:
        seed = engine.sequences[request_id].sampling.seed
        alone = replace(request, sampling=SamplingParams(seed=seed))
        assert engine.generated(request_id) == expected_token_ids(alone)
    engine.assert_all_free()


def test_a_failed_prefill_of_the_first_leaves_the_others_to_compute_it():
    engine = engine_of()
    request = request_of()
    engine.add(request)
    engine.scheduler.schedule()
    assert [one.request_id for one in engine.scheduler.fail_step()] == ["a"]
    engine.run()
    for request_id in request.choice_ids:
        assert len(engine.generated(request_id)) == 6
    engine.assert_all_free()


@pytest.mark.parametrize("num_choices", [1, 2])
def test_with_eight_blocks_fifty_requests_finish(num_choices):
    engine = engine_of(num_text_blocks=8, num_image_blocks=8)
    requests = [
        request_of(
            5 + number % 5,
            num_choices,
            name=f"r{number}-",
            max_tokens=4 + number % 9,
            images=[fake_image(f"p{number % 5}", 1 + number % 4)] * (number % 3),
            spans=[ImageSpan(1), ImageSpan(3)][: number % 3],
        )
        for number in range(50)
    ]
    for request in requests:
        engine.add(request)
    engine.run()
    assert engine.scheduler.snapshot().num_preemptions > 0
    for request in requests:
        assert_each_answers_as_alone(engine, request)


def test_a_long_prompt_is_not_starved_by_a_stream_of_short_ones():
    engine = engine_of(max_num_batched_tokens=8, max_num_seqs=4)
    for number in range(4):
        engine.add(request_of(4, 1, name=f"before{number}", max_tokens=4))
    engine.add(request_of(40, 1, name="long", max_tokens=1))
    num_steps = 0
    while not engine.generated("long"):
        engine.add(request_of(4, 1, name=f"after{num_steps}", max_tokens=4))
        engine.step()
        num_steps += 1
        assert num_steps < 30, "the long prompt is starved"


def test_a_better_priority_runs_first_and_the_worst_is_preempted():
    engine = engine_of(num_text_blocks=6, max_num_seqs=2)
    engine.add(request_of(8, 1, name="low", max_tokens=8, priority=3))
    engine.step()
    engine.add(request_of(8, 1, name="later", max_tokens=8))
    engine.add(request_of(8, 1, name="first", max_tokens=8, priority=-1))
    ended = []
    while engine.step():
        done = [name for name, one in engine.sequences.items() if one.is_finished]
        ended += [name for name in done if name not in ended]
    assert ended.index("first") < ended.index("later")
    assert engine.sequences["low"].num_preemptions > 0
    assert engine.sequences["first"].num_preemptions == 0
    engine.assert_all_free()
