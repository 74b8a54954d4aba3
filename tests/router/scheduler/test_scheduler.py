"""The scheduler over the two pools, one thing at a time; test_scheduler_mixes.py mixes them.

The runner hashes what each position may see. The expected answer comes from the request's
spans alone (`expected_token_ids`), so a wrong block, segment, chunk or recomputation changes
a request's tokens.
"""

from __future__ import annotations

import pytest
from support.fake_runner import expected_token_ids, fake_image
from support.scheduler_bench import Bench

from vlmserve.models.batch import ImageSpan, PoolSizes
from vlmserve.router.errors import InvalidRequestError
from vlmserve.router.messages import AddRequest


def request_of(request_id="a", prompt=(1, 2, 3), max_tokens=4, **fields) -> AddRequest:
    return AddRequest(
        request_id=request_id, prompt_token_ids=list(prompt), max_tokens=max_tokens, **fields
    )


def test_a_long_prompt_is_computed_in_chunks_beside_decodes():
    bench = Bench(max_num_batched_tokens=8)
    bench.add(request_of("decoding", max_tokens=20))
    bench.step()
    bench.add(request_of("long", prompt=range(30), max_tokens=2))
    batches = [bench.step() for _ in range(5)]
    chunks = [{one.request_id: len(one.token_ids) for one in batch.sequences} for batch in batches]
    assert chunks == [{"decoding": 1, "long": 7}] * 4 + [{"decoding": 1, "long": 2}]
    assert [batch.sequences[1].sampling is None for batch in batches] == [True] * 4 + [False]
    bench.run()
    bench.assert_all_free()


def test_requests_are_admitted_first_come_first_served():
    bench = Bench(max_num_seqs=2, max_num_batched_tokens=64)
    for name in "abc":
        bench.add(request_of(name, max_tokens=3))
    assert [one.request_id for one in bench.step().sequences] == ["a", "b"]
    bench.run()
    assert list(bench.endings) == ["a", "b", "c"]


def test_every_running_sequence_gets_its_token_even_if_the_budget_is_small():
    bench = Bench(max_num_seqs=8, max_num_batched_tokens=3)
    for name in "abcdef":
        bench.add(request_of(name, prompt=[1], max_tokens=8))
    started: set[str] = set()
    while (batch := bench.step()) is not None:
        scheduled = {one.request_id for one in batch.sequences}
        running = {name for name in started if name not in bench.endings}
        assert running <= scheduled | set(bench.endings)
        started |= scheduled
    bench.assert_all_free()


def test_the_newest_sequence_is_preempted_and_its_output_is_unchanged():
    # Two sequences of two blocks each that grow to four: only six are there.
    bench = Bench(pools=PoolSizes(6, 4, 4), max_model_len=24, prefix_cache=False, image_cache=False)
    old = request_of("old", prompt=range(7), max_tokens=9)
    new = request_of(
        "new",
        prompt=range(8),
        max_tokens=8,
        images=[fake_image("p", 2)],
        spans=[ImageSpan(1)],
    )
    bench.add(old)
    sequence = bench.add(new)
    bench.step()
    held_while_waiting = []
    while bench.step() is not None:
        if sequence.num_preemptions and sequence.num_computed_tokens == 0:
            held_while_waiting.append((sequence.block_ids, sequence.images))
    assert bench.sequences["old"].num_preemptions == 0
    assert sequence.num_preemptions >= 1
    assert held_while_waiting
    assert all(held == ([], []) for held in held_while_waiting)
    assert bench.tokens["old"] == expected_token_ids(old)
    assert bench.tokens["new"] == expected_token_ids(new)
    assert bench.runner.num_images_encoded == 1 + sequence.num_preemptions
    bench.assert_all_free()


def test_a_preempted_sequence_has_waited_until_it_first_ran():
    """Else its queue time would hold what it ran before, and its run time would not."""
    bench = Bench(pools=PoolSizes(6, 4, 4), max_model_len=24)
    bench.add(request_of("old", prompt=range(7), max_tokens=9))
    second = bench.add(request_of("new", prompt=range(8), max_tokens=8))
    bench.step()
    waited = second.queue_s
    assert waited > 0
    bench.run()
    assert second.num_preemptions >= 1
    assert second.queue_s == waited


def test_a_picture_counts_once_a_request_however_often_that_is_preempted():
    """Each start after a preemption counted as one more hit."""
    bench = Bench(pools=PoolSizes(6, 4, 4), max_model_len=24)
    picture = {"images": [fake_image("p", 2)], "spans": [ImageSpan(1)]}
    bench.add(request_of("old", prompt=range(7), max_tokens=9, **picture))
    second = bench.add(request_of("new", prompt=range(8), max_tokens=8, **picture))
    bench.run()
    assert second.num_preemptions >= 1
    pool = bench.scheduler.blocks.image_pool
    assert (pool.num_hits, pool.num_misses) == (1, 1)


def test_a_preempted_request_runs_before_those_that_came_after_it():
    bench = Bench(pools=PoolSizes(6, 4, 4), max_model_len=24)
    for name in ("first", "second", "third"):
        bench.add(request_of(name, prompt=range(8), max_tokens=10))
    bench.run()
    assert bench.scheduler.snapshot().num_preemptions > 0
    assert list(bench.endings) == ["first", "second", "third"]


def test_a_newcomer_leaves_each_running_sequence_a_block_to_grow_into():
    bench = Bench(pools=PoolSizes(4, 4, 4))
    bench.add(request_of("old", prompt=range(5), max_tokens=6))
    bench.step()
    # Two blocks are free and it needs two, but "old" is about to need a third.
    bench.add(request_of("new", prompt=range(10, 18), max_tokens=6))
    bench.run()
    assert bench.scheduler.snapshot().num_preemptions == 0
    assert list(bench.endings) == ["old", "new"]


def test_a_chunk_is_cut_where_images_appear_and_go():
    bench = Bench(max_num_batched_tokens=64)
    bench.add(
        request_of(
            prompt=range(12),
            images=[fake_image("p", 2), fake_image("q", 1), fake_image("r", 3)],
            spans=[ImageSpan(2, 7), ImageSpan(3, 7), ImageSpan(7)],
        )
    )
    batch = bench.step()
    first, second, third = (due.block_ids for due in batch.images)
    cut = [(segment.num_tokens, segment.block_ids) for segment in batch.sequences[0].segments]
    assert cut == [(2, []), (1, first), (4, first + second), (5, third)]
    decode = bench.step().sequences[0]
    assert [(segment.num_tokens, segment.block_ids) for segment in decode.segments] == [(1, third)]


def test_an_image_is_encoded_in_the_step_that_first_sees_it_and_only_there():
    bench = Bench(max_num_batched_tokens=4)
    bench.add(request_of(prompt=range(10), images=[fake_image("p")], spans=[ImageSpan(5)]))
    assert [len(bench.step().images) for _ in range(4)] == [0, 1, 0, 0]


def test_a_chunk_ends_before_an_image_that_is_too_many_for_its_step():
    bench = Bench(max_num_batched_tokens=64, max_num_batched_images=2)
    bench.add(request_of("decoding", max_tokens=20))
    bench.step()
    images = [fake_image(name) for name in "pqr"]
    spans = [ImageSpan(2), ImageSpan(3), ImageSpan(8)]
    bench.add(request_of("three", prompt=range(12), images=images, spans=spans))
    bench.add(request_of("image", images=images[:1], spans=spans[:1]))
    bench.add(request_of("text"))
    planned = [
        ({one.request_id: len(one.token_ids) for one in batch.sequences}, len(batch.images))
        for batch in (bench.step(), bench.step())
    ]
    assert planned == [
        ({"decoding": 1, "three": 8}, 2),
        ({"decoding": 1, "three": 4, "image": 3, "text": 3}, 1),
    ]
    bench.run()
    assert bench.runner.num_images_encoded == 3
    bench.assert_all_free()


def test_the_same_picture_in_two_requests_is_stored_and_encoded_once():
    bench = Bench(max_num_batched_tokens=64)
    for name in "ab":
        bench.add(request_of(name, images=[fake_image("p", 3)], spans=[ImageSpan(0)]))
    batch = bench.step()
    assert len(batch.images) == 1
    assert bench.scheduler.snapshot().images.used == 3
    bench.run()
    assert bench.runner.num_images_encoded == 1
    bench.assert_all_free()


def test_the_same_picture_of_two_tenants_is_kept_apart():
    bench = Bench(max_num_batched_tokens=64)
    for name in "ab":
        image = fake_image("p", 3)
        bench.add(request_of(name, images=[image], spans=[ImageSpan(0)], tenant=name))
    assert len(bench.step().images) == 2
    bench.run()
    bench.assert_all_free()


def test_a_shared_image_outlives_the_request_that_brought_it():
    bench = Bench(max_num_batched_tokens=64)
    image = fake_image("p", 3)
    bench.add(request_of("a", images=[image], spans=[ImageSpan(0)]))
    bench.add(request_of("b", max_tokens=9, images=[image], spans=[ImageSpan(0)]))
    bench.step()
    bench.abort("a")
    assert bench.scheduler.snapshot().images.used == 3
    bench.run()
    assert bench.tokens["b"] == expected_token_ids(bench.sequences["b"].request)
    assert bench.runner.num_images_encoded == 1
    bench.assert_all_free()


def test_an_image_that_was_due_in_a_failed_step_is_encoded_for_the_next_who_needs_it():
    bench = Bench(max_num_batched_tokens=6)
    image = fake_image("p")
    bench.add(request_of("fails", prompt=range(6), images=[image], spans=[ImageSpan(0)]))
    batch = bench.plan()
    assert len(batch.images) == 1
    bench.add(request_of("waits", prompt=range(6), images=[image], spans=[ImageSpan(0)]))
    assert [one.sequence_id for one in bench.scheduler.fail_step()] == ["fails"]
    bench.scheduler.check()
    assert len(bench.step().images) == 1
    bench.run()
    assert bench.tokens["waits"] == expected_token_ids(bench.sequences["waits"].request)
    bench.assert_all_free()


def test_a_failed_step_ends_its_sequences_and_spares_those_that_wait():
    bench = Bench(max_num_seqs=1)
    bench.add(request_of("fails"))
    bench.add(request_of("waits"))
    bench.plan()
    assert [one.sequence_id for one in bench.scheduler.fail_step()] == ["fails"]
    bench.run()
    assert list(bench.endings) == ["waits"]
    bench.assert_all_free()


@pytest.mark.parametrize("moment", ["waiting", "between steps", "in a step"])
def test_an_abort_frees_everything_within_the_step(moment):
    bench = Bench(max_num_batched_tokens=64)
    bench.add(request_of("a", images=[fake_image("p", 2)], spans=[ImageSpan(0)], max_tokens=50))
    if moment == "between steps":
        bench.step()
    batch = bench.plan() if moment == "in a step" else None
    bench.abort("a")
    bench.abort("a")
    if batch is not None:
        bench.finish(batch)
    assert bench.endings == {"a": "abort"}
    bench.assert_all_free()
    assert bench.step() is None


def test_an_abort_that_comes_after_the_end_changes_nothing():
    bench = Bench()
    bench.add(request_of("a"))
    bench.run()
    bench.abort("a")
    assert bench.endings == {"a": "length"}


def test_end_of_turn_is_a_stop_without_a_token_id_and_a_stop_token_is_reported():
    alone = expected_token_ids(request_of(max_tokens=3))
    for fields, stop_token_id in [
        ({"eos_token_ids": alone[1:2]}, None),
        ({"stop_token_ids": alone[1:2]}, alone[1]),
        ({"eos_token_ids": alone[1:2], "stop_token_ids": alone[1:2]}, None),
    ]:
        bench = Bench()
        bench.add(request_of(max_tokens=9, **fields))
        bench.step()
        (progress,) = bench.scheduler.update(bench.runner.execute(bench.plan()))
        assert progress.finish_reason == "stop"
        assert progress.token_ids == [alone[1]]
        assert progress.stop_token_id == stop_token_id


def test_generation_ends_at_the_context_length():
    bench = Bench(max_model_len=10)
    bench.add(request_of(prompt=range(6), max_tokens=100))
    bench.run()
    assert len(bench.tokens["a"]) == 4
    assert bench.endings == {"a": "length"}


def test_a_context_larger_than_the_pool_is_cut_to_the_pool():
    bench = Bench(pools=PoolSizes(2, 4, 4), max_model_len=1000)
    bench.add(request_of(prompt=range(6), max_tokens=100))
    bench.run()
    assert len(bench.tokens["a"]) == 2
    with pytest.raises(InvalidRequestError, match="max_model_len is 8"):
        bench.add(request_of("b", prompt=range(8)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": []}, "at least one"),
        ({"prompt": range(64)}, "64 tokens .* max_model_len is 64: shorten"),
        ({"prompt": [5, -1]}, "token id -1 is out of range"),
        ({"prompt": [5, 1008]}, "token id 1008 is out of range"),
        ({"images": [fake_image("p")]}, "1 images but 0 spans"),
        ({"images": [fake_image("p")], "spans": [ImageSpan(3)]}, "covers none of the prompt"),
        ({"images": [fake_image("p")], "spans": [ImageSpan(2, 2)]}, "covers none of the prompt"),
        ({"images": [fake_image("p")] * 2, "spans": [ImageSpan(1)] * 2}, "its own token"),
        ({"images": [fake_image("p", 5)], "spans": [ImageSpan(0)]}, "up to 4 of 2"),
        ({"images": [fake_image("p", 1, 3)], "spans": [ImageSpan(0)]}, "up to 4 of 2"),
        (
            {
                "images": [fake_image(n, 4) for n in "pqr"],
                "spans": [ImageSpan(0), ImageSpan(1), ImageSpan(2)],
            },
            "12 tiles; the cache has 8",
        ),
    ],
)
def test_what_could_never_run_is_refused_with_the_numbers_and_a_remedy(fields, message):
    with pytest.raises(InvalidRequestError, match=message):
        Bench().add(request_of(**fields))


def test_one_picture_named_three_times_needs_its_blocks_once():
    bench = Bench(max_num_batched_tokens=64)
    images = [fake_image("p", 4)] * 3
    bench.add(request_of(images=images, spans=[ImageSpan(0), ImageSpan(1), ImageSpan(2)]))
    bench.run()
    assert bench.tokens["a"] == expected_token_ids(bench.sequences["a"].request)
    bench.assert_all_free()
