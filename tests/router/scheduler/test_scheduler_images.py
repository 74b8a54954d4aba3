"""What a step encodes of pictures: beside running streams, and where nobody streams.

The runner checks that every part of an image goes on where the last one ended, and hashes what each
position sees; test_scheduler_mixes.py mixes all of this.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from support.fake_runner import expected_token_ids, fake_image
from support.scheduler_bench import Bench

from vlmserve.models.batch import ImageSpan, StepBatch, StepResult
from vlmserve.router.messages import AddRequest
from vlmserve.router.scheduler.step_budget import ImageCost

Layers = list[tuple[int, int | None]]


def text(request_id: str, max_tokens: int = 40, **fields) -> AddRequest:
    return AddRequest(
        request_id=request_id, prompt_token_ids=[1, 2, 3], max_tokens=max_tokens, **fields
    )


def picture(request_id: str, num_images: int = 1, **fields) -> AddRequest:
    """A prompt of 6 tokens that sees its pictures from the second token on."""
    return AddRequest(
        request_id=request_id,
        prompt_token_ids=list(range(6)),
        images=[fake_image(f"{request_id}{number}") for number in range(num_images)],
        spans=[ImageSpan(1 + number) for number in range(num_images)],
        max_tokens=4,
        **fields,
    )


def layers(batch: StepBatch | None) -> Layers:
    assert batch is not None
    return [(due.begin, due.end) for due in batch.images]


def tokens(batch: StepBatch | None) -> dict[str, int]:
    assert batch is not None
    return {one.request_id: len(one.token_ids) for one in batch.sequences}


def streaming(**options) -> Bench:
    """A bench on which one stream decodes."""
    bench = Bench(**options)
    bench.add(text("stream"))
    bench.step()
    return bench


def assert_all_answered(bench: Bench, *requests: AddRequest) -> None:
    bench.run()
    for request in requests:
        assert bench.tokens[request.request_id] == expected_token_ids(request)
    bench.assert_all_free()


def test_without_streams_a_step_encodes_as_many_images_as_it_may_whatever_they_cost():
    bench = Bench(max_num_batched_tokens=64, image_cost_tokens=1000, num_image_layers=8)
    asked = [picture(name) for name in "abcde"]
    for request in asked:
        bench.add(request)
    batch = bench.step()
    assert layers(batch) == [(0, None)] * 4
    assert tokens(batch) == dict.fromkeys("abcd", 6)
    assert_all_answered(bench, *asked)


def test_beside_streams_images_count_against_the_budget_of_tokens():
    bench = streaming(max_num_batched_tokens=40, image_cost_tokens=12, num_image_layers=4)
    asked = [picture(name) for name in "abc"]
    for request in asked:
        bench.add(request)
    first, second = bench.step(), bench.step()
    assert layers(first) == [(0, None)] * 2
    assert tokens(first) == {"stream": 1, "a": 6, "b": 6}  # and 24 for two images
    assert layers(second) == [(0, None)]
    assert_all_answered(bench, *asked)


def test_an_image_that_costs_more_than_a_chunk_is_encoded_over_several_steps():
    bench = streaming(max_num_batched_tokens=11, image_cost_tokens=40, num_image_layers=8)
    asked = picture("a")
    bench.add(asked)
    steps = [bench.step() for _ in range(5)]
    assert [layers(batch) for batch in steps] == [[(0, 2)], [(2, 4)], [(4, 6)], [(6, None)], []]
    assert [tokens(batch) for batch in steps] == [{"stream": 1}] * 4 + [{"stream": 1, "a": 6}]
    assert_all_answered(bench, asked)


def test_a_step_encodes_one_layer_at_least():
    bench = streaming(
        max_num_seqs=2, max_num_batched_tokens=2, image_cost_tokens=1000, num_image_layers=3
    )
    asked = picture("a")
    bench.add(asked)
    encoded = [layers(bench.step()) for _ in range(4)]
    assert encoded == [[], [(0, 1)], [(1, 2)], [(2, None)]]  # first the token before it
    assert_all_answered(bench, asked)


def test_when_the_streams_have_ended_the_rest_of_an_image_is_encoded_at_once():
    bench = Bench(max_num_batched_tokens=11, image_cost_tokens=80, num_image_layers=8)
    bench.add(text("stream", max_tokens=3))
    bench.step()
    asked = [picture("a"), picture("b")]
    for request in asked:
        bench.add(request)
    assert [layers(bench.step()) for _ in range(2)] == [[(0, 1)], [(1, 2)]]
    assert layers(bench.step()) == [(2, None), (0, None)]
    assert_all_answered(bench, *asked)


def test_a_request_without_pictures_is_admitted_beside_one_whose_picture_is_in_parts():
    bench = streaming(max_num_batched_tokens=16, image_cost_tokens=40, num_image_layers=2)
    asked = [picture("a"), picture("b"), text("words")]
    bench.add(asked[0])
    bench.step()
    bench.add(asked[2])
    bench.add(asked[1])
    batch = bench.step()
    assert layers(batch) == [(1, None)] or layers(batch) == [(0, 1)]
    assert_all_answered(bench, *asked)


def test_one_picture_in_two_requests_is_encoded_once_in_parts_too():
    bench = streaming(max_num_batched_tokens=16, image_cost_tokens=40, num_image_layers=8)
    first = picture("a")
    same = AddRequest(
        request_id="b", prompt_token_ids=[5, 6, 7], images=first.images, spans=[ImageSpan(0)],
        max_tokens=3,
    )  # fmt: skip
    for request in (first, same):
        bench.add(request)
    assert_all_answered(bench, first, same)
    assert bench.runner.num_images_encoded == 1


def test_who_comes_next_begins_its_picture_when_the_one_in_parts_is_done():
    bench = streaming(max_num_batched_tokens=12, image_cost_tokens=40, num_image_layers=4)
    first, urgent = picture("first"), picture("urgent", priority=-1)
    bench.add(first)
    assert layers(bench.step()) == [(0, 1)]
    bench.add(urgent)
    encoded = [layers(bench.step()) for _ in range(7)]
    ends = [end for ((_, end),) in encoded]
    assert ends == [2, 3, None, 1, 2, 3, None]
    assert_all_answered(bench, first, urgent)


def test_a_picture_whose_request_leaves_between_parts_begins_anew_for_the_next():
    bench = streaming(max_num_batched_tokens=12, image_cost_tokens=40, num_image_layers=4)
    bench.add(picture("gone"))
    assert layers(bench.step()) == [(0, 1)]
    bench.abort("gone")
    again = picture("gone")
    again.request_id = "again"
    bench.add(again)
    assert layers(bench.step()) == [(0, 1)]
    assert_all_answered(bench, again)


def test_after_a_failed_step_an_image_begins_anew():
    for is_computed in (False, True):
        bench = streaming(max_num_batched_tokens=12, image_cost_tokens=40, num_image_layers=4)
        asked = picture("a")
        bench.add(asked)
        bench.step()
        bench.add(text("other"))
        batch = bench.plan()
        assert layers(batch) == [(1, 2)]
        assert "a" not in tokens(batch)  # it does not fail: nothing of it was in the step
        bench.fail(batch, is_computed=is_computed)
        bench.add(text("more"))
        assert layers(bench.step())[0][0] == 0
        assert_all_answered(bench, asked)


def test_pictures_are_answered_however_many_streams_come():
    """A new stream in every step, a full house of them, and budgets that are just enough."""
    bench = Bench(
        max_num_seqs=4, max_num_batched_tokens=4, image_cost_tokens=100, num_image_layers=6
    )
    asked = picture("a", num_images=3)
    num_streams = 0
    for _ in range(12):
        bench.add(text(f"s{num_streams}", max_tokens=5))
        num_streams += 1
    bench.add(asked)
    num_steps = 0
    while "a" not in bench.endings:
        bench.add(text(f"s{num_streams}", max_tokens=5))
        num_streams += 1
        bench.step()
        num_steps += 1
        # 12 streams before it, 4 at once, 8 steps each at most, then 18 layers and 10 tokens
        assert num_steps < 24 + 18 + 10
    assert bench.tokens["a"] == expected_token_ids(asked)


def test_costs_are_shared_out_over_layers_and_rounded_up():
    cost = ImageCost(num_tokens=10, num_layers=4)
    assert [cost.of(count) for count in range(5)] == [0, 3, 5, 8, 10]
    assert [cost.layers_for(count) for count in (2, 3, 5, 10, 100)] == [0, 1, 2, 4, 40]
    assert ImageCost(num_tokens=0, num_layers=1).of(1) == 0


def test_the_encoders_time_is_shared_by_the_images_of_a_step_and_cached_ones_take_none():
    bench = Bench()
    execute = bench.runner.execute

    num_encoding = 0

    def timed(batch: StepBatch, *others: Any) -> StepResult:
        nonlocal num_encoding
        result = execute(batch, *others)
        num_encoding += bool(batch.images)
        result.vision_seconds = 1.0 if batch.images else 0.0
        return result

    bench.runner.execute = timed  # type: ignore[method-assign]
    bench.add(picture("one"))
    bench.add(picture("two", num_images=2))
    bench.run()
    parts = [bench.sequences[name].vision_s for name in ("one", "two")]
    assert all(part > 0 for part in parts)
    assert sum(parts) == pytest.approx(num_encoding)
    again = msgspec.structs.replace(picture("one"), request_id="again")
    bench.add(again)
    bench.run()
    assert bench.sequences["again"].vision_s == 0.0
    bench.assert_all_free()
