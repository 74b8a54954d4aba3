"""Adapters in the scheduler: places, turns, and which cached blocks they share."""

from __future__ import annotations

import pytest
from support.fake_runner import expected_token_ids, fake_adapter, fake_image
from support.scheduler_bench import Bench

from vlmserve.models.batch import ImageSpan, PoolSizes, SamplingParams
from vlmserve.router.messages import AddRequest

PROMPT = list(range(8))


def request_of(request_id: str, adapter: str | None = None, **fields) -> AddRequest:
    named = None if adapter is None else fake_adapter(adapter)
    fields = {"prompt_token_ids": PROMPT, "max_tokens": 4} | fields
    return AddRequest(request_id=request_id, adapter=named, **fields)


def picture(request_id: str, adapter: str | None, start: int = 5, **fields) -> AddRequest:
    return request_of(
        request_id, adapter, images=[fake_image("p", 2)], spans=[ImageSpan(start)], **fields
    )


def started(bench: Bench) -> set[str]:
    return {name for name, one in bench.sequences.items() if one.ran_at is not None}


def test_a_step_mixes_adapters_and_the_base_model():
    bench = Bench(max_loras=3, max_num_batched_tokens=64)
    requests = [request_of(name, name) for name in ("text1", "text2", "both")]
    requests += [request_of("base"), picture("image", "images")]
    for request in requests[:4]:
        bench.add(request)
    assert {one.adapter for one in bench.step().sequences} == {
        "", *(one.adapter.digest for one in requests[:3])
    }  # fmt: skip
    bench.add(requests[4])
    bench.run()
    assert bench.runner.max_batched_adapters == 3
    assert bench.tokens == {one.request_id: expected_token_ids(one) for one in requests}
    bench.assert_all_free()


def test_a_request_without_a_place_for_its_adapter_lets_others_pass():
    bench = Bench(max_loras=1)
    for request in (
        request_of("first", "text1"),
        request_of("blocked", "text2"),
        request_of("base"),
        request_of("images", "images"),
    ):
        bench.add(request)
    bench.step()
    bench.step()
    assert started(bench) == {"first", "base"}
    bench.run()
    assert set(bench.endings.values()) == {"length"}
    assert bench.runner.max_batched_adapters == 1


@pytest.mark.parametrize("owners", [("", ""), ("x", "y")])
def test_an_adapter_whose_requests_never_stop_gives_up_its_place(owners):
    """The waiting request starts when those that ran before it have ended, however many come."""
    bench = Bench(max_loras=1, max_num_seqs=4, pools=PoolSizes(64, 8, 4))
    busy, waiting = owners
    bench.add(request_of("a0", "text1", owner=busy, max_tokens=12))
    bench.step()
    bench.add(request_of("other", "text2", owner=waiting))
    num_steps, number = 0, 1
    while "other" not in started(bench):
        if len(bench.queue) < 3:
            bench.add(request_of(f"a{number}", "text1", owner=busy, max_tokens=12))
            number += 1
        bench.step()
        num_steps += 1
        assert num_steps <= 12, "it starves"
    assert started(bench) == {"a0", "other"}
    bench.run()
    assert set(bench.endings.values()) == {"length"}
    bench.assert_all_free()


def test_base_requests_go_on_while_an_adapter_closes():
    bench = Bench(max_loras=1, max_num_seqs=4)
    bench.add(request_of("a0", "text1", max_tokens=12))
    bench.step()
    bench.add(request_of("other", "text2"))
    bench.add(request_of("a1", "text1"))
    bench.add(request_of("base"))
    bench.step()
    bench.step()
    assert started(bench) == {"a0", "base"}
    bench.abort("other")
    bench.step()
    assert "a1" in started(bench), "nothing waits for a place any longer"
    bench.run()
    bench.assert_all_free()


def test_the_adapter_with_the_fewest_answers_closes():
    bench = Bench(max_loras=2, max_num_seqs=6, pools=PoolSizes(64, 8, 4))
    for name in ("a0", "a1", "b0"):
        bench.add(request_of(name, {"a": "text1", "b": "text2"}[name[0]], max_tokens=10))
    bench.step()
    bench.step()
    bench.add(request_of("c0", "text3"))
    bench.add(request_of("b1", "text2"))
    bench.add(request_of("a2", "text1"))
    bench.step()
    assert started(bench) == {"a0", "a1", "b0", "a2"}
    bench.run()
    assert set(bench.endings.values()) == {"length"}


def test_a_preempted_sequence_comes_back_before_the_adapter_that_waits():
    """Its adapter has lost its place meanwhile, and comes first again."""
    bench = Bench(
        max_loras=1, pools=PoolSizes(6, 4, 4), max_num_batched_tokens=64, prefix_cache=False
    )
    requests = [request_of(name, "text1", max_tokens=12) for name in ("a0", "a1")]
    requests.append(request_of("c", "text2"))
    for request in requests:
        bench.add(request)
    bench.run()
    assert bench.scheduler.snapshot().num_preemptions > 0
    assert bench.tokens == {one.request_id: expected_token_ids(one) for one in requests}
    order = sorted(bench.sequences.values(), key=lambda one: one.ran_at)
    assert order[-1].request_id == "c"


@pytest.mark.parametrize(
    ("first", "second", "num_hits", "num_encoded"),
    [
        # text only: pictures are shared with the base model, texts are not
        (None, "text1", 0, 1),
        ("text1", "text1", 16, 1),
        ("text1", "text2", 0, 1),
        # images only: the text before the picture is shared, the picture is not
        (None, "images1", 4, 2),
        ("images1", "images1", 16, 1),
        ("images1", "images2", 4, 2),
        # both: nothing is shared but with itself
        (None, "both1", 0, 2),
        ("both1", "both1", 16, 1),
        ("both1", "both2", 0, 2),
        # neither, as an adapter whose matrices are all zero
        (None, "none", 16, 1),
    ],
)
def test_caches_share_what_an_adapter_does_not_change(first, second, num_hits, num_encoded):
    bench = Bench(max_loras=1, max_num_batched_tokens=64, max_model_len=64)
    requests = [
        picture(name, adapter, prompt_token_ids=list(range(17)), start=5)
        for name, adapter in (("one", first), ("two", second))
    ]
    for request in requests:
        bench.add(request)
        bench.run()
        assert bench.tokens[request.request_id] == expected_token_ids(request)
    assert bench.sequences["two"].num_cached_tokens == num_hits
    assert bench.runner.num_images_encoded == num_encoded
    images = bench.scheduler.snapshot().images
    assert (images.num_hits, images.num_misses) == (2 - num_encoded, num_encoded)
    bench.assert_all_free()


def test_answers_to_one_prompt_share_its_adapter():
    bench = Bench(max_loras=1)
    greedy = SamplingParams(temperature=0.0)
    request = request_of("a", "both1", choice_ids=["b", "c"], sampling=greedy)
    bench.add(request)
    bench.add(request_of("other", "text2"))
    bench.run()
    assert bench.tokens["b"] == bench.tokens["a"] == expected_token_ids(request)
    assert bench.runner.max_batched_adapters == 1
    bench.assert_all_free()
