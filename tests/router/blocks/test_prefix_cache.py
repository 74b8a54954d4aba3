"""The prefix cache: what is found again, what is not, and that no answer changes by it.

The fake runner hashes what the blocks really hold, so a block that is found where it should
not be, or was overwritten, changes an answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.fake_runner import FakeRunner, expected_token_ids, fake_image, fake_info

from vlmserve.models.batch import ImageSpan, PoolSizes, SamplingParams
from vlmserve.router.blocks import prefix_keys as prefix
from vlmserve.router.blocks.prefix_keys import extend_block_keys
from vlmserve.router.blocks.text_pool import TextPool
from vlmserve.router.errors import OutOfBlocksError
from vlmserve.router.messages import AddRequest
from vlmserve.router.scheduler.admission import AdmissionLimits, check_request
from vlmserve.router.scheduler.interface import SchedulerLimits
from vlmserve.router.scheduler.request_queue import QueueLimits, RequestQueue
from vlmserve.router.scheduler.scheduler import Scheduler
from vlmserve.router.scheduler.sequence import Sequence

BLOCK_SIZE = 4


@dataclass
class Bench:
    """A scheduler and a fake runner, stepped by hand; blocks of four tokens."""

    num_text_blocks: int = 64
    num_image_blocks: int = 8
    max_num_batched_tokens: int = 16
    max_num_batched_images: int = 4
    max_num_seqs: int = 4
    prefix_cache: bool = True
    image_cache: bool = True
    sequences: dict[str, Sequence] = field(default_factory=dict)
    starts: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pools = PoolSizes(self.num_text_blocks, self.num_image_blocks, BLOCK_SIZE)
        self.runner = FakeRunner(fake_info(pools, max_model_len=48))
        self.limits = AdmissionLimits.of(self.runner.info)
        limits = SchedulerLimits(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_batched_images=self.max_num_batched_images,
            max_model_len=self.limits.max_model_len,
            prefix_cache=self.prefix_cache,
            image_cache=self.image_cache,
        )
        self.queue = RequestQueue(QueueLimits(1000, 10**6, 10**9))
        self.scheduler = Scheduler(self.runner.info, limits, self.queue)

    def add(self, request: AddRequest) -> Sequence:
        check_request(request, self.limits)
        sequence = Sequence(request.request_id, 0, request)
        self.sequences[request.request_id] = sequence
        self.queue.put(sequence)
        return sequence

    def step(self) -> bool:
        batch = self.scheduler.schedule()
        if batch is None:
            return False
        assert batch.num_tokens <= self.max_num_batched_tokens
        assert len(batch.images) <= self.max_num_batched_images
        for one in batch.sequences:
            self.starts.setdefault(one.request_id, []).append(one.start)
        self.scheduler.update(self.runner.execute(batch))
        self.scheduler.check()
        return True

    def run(self) -> None:
        for _ in range(5000):
            if not self.step():
                return
        raise AssertionError("the requests do not finish")

    def ask(self, request: AddRequest) -> Sequence:
        """Run `request` alone on what came before; its sequence, its answer checked."""
        sequence = self.add(request)
        self.run()
        self.assert_answered_as_if_alone(sequence)
        return sequence

    def assert_answered_as_if_alone(self, sequence: Sequence) -> None:
        room = self.limits.max_model_len - len(sequence.request.prompt_token_ids)
        assert generated(sequence) == expected_token_ids(sequence.request)[:room]


def generated(sequence: Sequence) -> list[int]:
    return sequence.token_ids[len(sequence.request.prompt_token_ids) :]


def ask_for(
    prompt: Iterable[int],
    *images: tuple[str, ImageSpan],
    name: str = "a",
    max_tokens: int = 2,
    tenant: str = "",
    seed: int = 0,
) -> AddRequest:
    """A request; each image is its name, whose last letter may count its tiles, and its span."""
    return AddRequest(
        request_id=name,
        prompt_token_ids=list(prompt),
        images=[fake_image(title, int(title[-1])) for title, _ in images],
        spans=[span for _, span in images],
        sampling=SamplingParams(seed=seed),
        max_tokens=max_tokens,
        tenant=tenant,
    )


# What is found


def test_a_prompt_asked_again_computes_only_from_its_last_full_block_on():
    bench = Bench()
    assert bench.ask(ask_for(range(10))).num_cached_tokens == 0
    assert bench.ask(ask_for(range(10))).num_cached_tokens == 8
    assert bench.scheduler.blocks.num_prefix_tokens_queried == 20
    assert bench.scheduler.blocks.num_prefix_tokens_hit == 8


def test_the_last_prompt_token_is_computed_even_if_all_blocks_are_there():
    bench = Bench()
    bench.ask(ask_for(range(8)))
    assert bench.ask(ask_for(range(8), name="b")).num_cached_tokens == 4


def test_the_next_turn_finds_the_answer_of_the_one_before():
    bench = Bench()
    first = bench.ask(ask_for(range(6), max_tokens=11))
    second = bench.ask(ask_for([*first.token_ids, 1, 2], name="b"))
    # 16 of the 17 tokens have keys and values; the last was sampled, never computed.
    assert second.num_cached_tokens == 16


def test_another_token_another_beginning_or_another_tenant_finds_only_what_is_the_same():
    bench = Bench()
    bench.ask(ask_for(range(12)))
    assert bench.ask(ask_for([*range(8), 99, 98, 97, 96, 95], name="b")).num_cached_tokens == 8
    assert bench.ask(ask_for([99, *range(1, 12)], name="c")).num_cached_tokens == 0
    assert bench.ask(ask_for(range(12), name="d", tenant="t")).num_cached_tokens == 0
    assert bench.ask(ask_for(range(12), name="e", tenant="t")).num_cached_tokens == 8


def test_text_before_the_first_image_is_shared_and_text_behind_it_is_not():
    bench = Bench()
    bench.ask(ask_for(range(14), ("p1", ImageSpan(5))))
    assert bench.ask(ask_for(range(14), ("q1", ImageSpan(5)), name="b")).num_cached_tokens == 4
    assert bench.ask(ask_for(range(14), name="c")).num_cached_tokens == 4
    assert bench.ask(ask_for(range(14), ("p1", ImageSpan(5)), name="d")).num_cached_tokens == 12


def test_the_same_picture_seen_from_another_position_is_another_block():
    bench = Bench()
    bench.ask(ask_for(range(14), ("p1", ImageSpan(5))))
    assert bench.ask(ask_for(range(14), ("p1", ImageSpan(6)), name="b")).num_cached_tokens == 4
    assert bench.ask(ask_for(range(14), ("p1", ImageSpan(5, 9)), name="c")).num_cached_tokens == 8


def test_an_image_that_ends_behind_the_shared_blocks_does_not_matter_to_them():
    bench = Bench()
    bench.ask(ask_for(range(14), ("p1", ImageSpan(2))))
    request = ask_for(range(20), ("p1", ImageSpan(2, 14)), ("q1", ImageSpan(14)), name="b")
    assert bench.ask(request).num_cached_tokens == 12


def test_tiles_of_the_same_bytes_cut_otherwise_are_other_pictures():
    bench = Bench()
    bench.ask(ask_for(range(9), ("p1", ImageSpan(0))))
    assert bench.ask(ask_for(range(9), ("p2", ImageSpan(0)), name="b")).num_cached_tokens == 0


def test_switched_off_nothing_is_found():
    bench = Bench(prefix_cache=False)
    bench.ask(ask_for(range(12)))
    assert bench.ask(ask_for(range(12), name="b")).num_cached_tokens == 0
    assert bench.scheduler.snapshot().text.cached == 0


def test_blocks_of_a_failed_step_are_not_found():
    bench = Bench(max_num_batched_tokens=8)
    bench.add(ask_for(range(14)))
    bench.step()
    assert bench.scheduler.schedule() is not None
    bench.scheduler.fail_step()
    bench.scheduler.check()
    assert bench.ask(ask_for(range(14), name="b")).num_cached_tokens == 8


def test_blocks_of_an_aborted_request_are_found():
    bench = Bench(max_num_batched_tokens=8)
    sequence = bench.add(ask_for(range(14)))
    bench.step()
    bench.scheduler.abort(sequence)
    assert bench.ask(ask_for(range(14), name="b")).num_cached_tokens == 8


def test_two_that_run_at_once_share_blocks():
    bench = Bench()
    bench.add(ask_for(range(9), max_tokens=8))
    bench.step()
    second = bench.add(ask_for(range(9), name="b", max_tokens=8, seed=1))
    bench.step()
    assert second.block_ids[:2] == bench.sequences["a"].block_ids[:2]
    assert second.block_ids[2] != bench.sequences["a"].block_ids[2]
    bench.run()
    for sequence in bench.sequences.values():
        bench.assert_answered_as_if_alone(sequence)


def test_a_preempted_sequence_finds_its_own_blocks_again():
    bench = Bench(num_text_blocks=8)
    bench.add(ask_for(range(7), max_tokens=13))
    second = bench.add(ask_for(range(20, 28), name="b", max_tokens=12))
    bench.run()
    assert second.num_preemptions > 0
    for sequence in bench.sequences.values():
        bench.assert_answered_as_if_alone(sequence)
    starts = bench.starts["b"]
    assert starts.count(0) == 1
    assert bench.scheduler.blocks.num_prefix_tokens_hit == 0, "its own blocks are no hits"


# Images behind a cached prefix


def test_an_image_whose_token_is_skipped_is_acquired_and_not_encoded_again():
    bench = Bench()
    bench.ask(ask_for(range(14), ("p2", ImageSpan(1))))
    bench.add(ask_for(range(14), ("p2", ImageSpan(1)), name="b"))
    bench.step()
    assert bench.scheduler.snapshot().images.used == 2
    bench.run()
    bench.assert_answered_as_if_alone(bench.sequences["b"])
    assert bench.runner.num_images_encoded == 1


def test_an_image_whose_token_is_skipped_is_encoded_where_the_pool_lost_it():
    bench = Bench(image_cache=False)
    bench.ask(ask_for(range(14), ("p2", ImageSpan(1))))
    assert bench.ask(ask_for(range(14), ("p2", ImageSpan(1)), name="b")).num_cached_tokens == 12
    assert bench.runner.num_images_encoded == 2


def test_an_image_that_no_computed_token_sees_is_not_encoded():
    bench = Bench(image_cache=False)
    bench.ask(ask_for(range(14), ("p2", ImageSpan(1, 6))))
    assert bench.ask(ask_for(range(14), ("p2", ImageSpan(1, 6)), name="b")).num_cached_tokens == 12
    assert bench.runner.num_images_encoded == 1


def test_a_prefix_is_cut_where_a_step_could_not_encode_all_images_behind_it():
    bench = Bench(image_cache=False, max_num_batched_images=1)
    images = [("p1", ImageSpan(1)), ("q1", ImageSpan(6)), ("r1", ImageSpan(9))]
    bench.ask(ask_for(range(18), *images))
    # Token 4 sees one image, token 8 two: only the first block may be skipped.
    assert bench.ask(ask_for(range(18), *images, name="b")).num_cached_tokens == 4
    assert bench.runner.num_images_encoded == 6


def test_a_sequence_waits_for_the_images_behind_its_prefix_that_a_step_has_no_room_for():
    bench = Bench(image_cache=False, max_num_batched_images=2, max_num_batched_tokens=64)
    one = [("p1", ImageSpan(1))]
    two = [("q1", ImageSpan(1)), ("r1", ImageSpan(2))]
    bench.ask(ask_for(range(14), *one))
    bench.ask(ask_for(range(20, 34), *two, name="b"))
    first = bench.add(ask_for(range(14), *one, name="c"))
    second = bench.add(ask_for(range(20, 34), *two, name="d"))
    bench.step()
    assert (first.num_computed_tokens, second.num_computed_tokens) == (14, 12)
    bench.step()
    assert second.num_computed_tokens == 14
    bench.run()
    bench.assert_answered_as_if_alone(first)
    bench.assert_answered_as_if_alone(second)
    assert bench.runner.num_images_encoded == 6


# Any mix


@st.composite
def conversations(draw):
    """Requests that begin alike: cut from one of two texts, with a few pictures, and changed."""
    plan = []
    for number in range(draw(st.integers(2, 8))):
        text = list(range(40)) if draw(st.booleans()) else [7] * 40
        length = draw(st.integers(1, 36))
        prompt = text[:length]
        if draw(st.booleans()):
            prompt[draw(st.integers(0, length - 1))] = 99
        images = []
        for start in (1, 6, 7, 18):
            if start < length and draw(st.booleans()):
                end = draw(st.sampled_from([None, start + 1, 8, 12, 30]))
                name = draw(st.sampled_from(["p1", "q2", "r1"]))
                images.append((name, ImageSpan(start, end if end and end > start else None)))
        request = ask_for(
            prompt,
            *images,
            name=str(number),
            max_tokens=draw(st.integers(1, 12)),
            tenant=draw(st.sampled_from(["", "", "t"])),
            seed=draw(st.integers(0, 1)),
        )
        plan.append((draw(st.integers(0, 20)), request, draw(st.none() | st.integers(0, 12))))
    bench = Bench(
        num_text_blocks=draw(st.integers(12, 24)),
        num_image_blocks=draw(st.integers(5, 8)),
        max_num_batched_tokens=draw(st.integers(1, 20)),
        max_num_batched_images=draw(st.integers(1, 2)),
        image_cache=draw(st.integers(0, 3)) > 0,
        prefix_cache=draw(st.integers(0, 5)) > 0,
    )
    return bench, plan


quiet = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@given(conversations())
@settings(quiet, max_examples=150, derandomize=True)
def test_any_mix_of_conversations_that_begin_alike_answers_as_if_alone(scenario):
    run_mix(*scenario)


@pytest.mark.slow
@given(conversations())
@settings(quiet, max_examples=2000)
def test_thousands_of_conversations_answer_as_if_alone(scenario):
    run_mix(*scenario)


def run_mix(bench: Bench, plan: list[tuple[int, AddRequest, int | None]]) -> None:
    now, arrived = 0, 0
    while arrived < len(plan) or bench.scheduler.has_work:
        for arrives_at, request, aborts_after in plan:
            if arrives_at == now:
                bench.add(request)
                arrived += 1
            if aborts_after is not None and arrives_at + aborts_after == now:
                bench.scheduler.abort(bench.sequences[request.request_id])
        bench.step()
        now += 1
        assert now < 5000, "the requests do not finish"
    for _, request, aborts_after in plan:
        sequence = bench.sequences[request.request_id]
        if aborts_after is None:
            bench.assert_answered_as_if_alone(sequence)
        else:
            got = generated(sequence)
            assert got == expected_token_ids(request)[: len(got)]
    assert bench.scheduler.snapshot().text.used == 0
    assert bench.scheduler.snapshot().images.used == 0


# Keys


def keys_of(prompt: Iterable[int], *images: tuple[str, ImageSpan], tenant: str = "") -> list[bytes]:
    sequence = Sequence("a", 0, ask_for(prompt, *images, tenant=tenant))
    return list(sequence.full_block_keys(BLOCK_SIZE))


def test_only_full_blocks_have_keys_and_growing_gives_the_keys_of_the_whole():
    sequence = Sequence("a", 0, ask_for(range(7), ("p1", ImageSpan(2))))
    assert len(sequence.full_block_keys(BLOCK_SIZE)) == 1
    sequence.token_ids += [7, 8]
    assert sequence.full_block_keys(BLOCK_SIZE) == keys_of(range(9), ("p1", ImageSpan(2)))
    assert len(sequence.full_block_keys(BLOCK_SIZE)) == 2


def test_keys_are_made_once():
    keys: list[bytes] = [b"made before"]
    extend_block_keys(keys, list(range(7)), [], [], "", BLOCK_SIZE)
    assert keys == [b"made before"]


@st.composite
def pictures(draw, num_tokens: int) -> list[tuple[str, ImageSpan]]:
    """Pictures as prompts have them, each with a start of its own, some of them alike."""
    starts = sorted(draw(st.sets(st.integers(0, num_tokens - 1), max_size=5)))
    ends = [draw(st.none() | st.integers(start + 1, num_tokens)) for start in starts]
    return [
        (draw(st.sampled_from(["p1", "q1", "q2"])), ImageSpan(start, end))
        for start, end in zip(starts, ends, strict=True)
    ]


@given(pictures(num_tokens=40))
def test_keys_are_the_same_whether_made_together_or_block_by_block(images):
    sequence = Sequence("a", 0, ask_for(range(40), *images))
    spans, keys = sequence.request.spans, sequence.image_keys
    one_by_one: list[bytes] = []
    for end in range(BLOCK_SIZE, 41, BLOCK_SIZE):
        extend_block_keys(one_by_one, list(range(end)), spans, keys, "", BLOCK_SIZE)
    assert one_by_one == keys_of(range(40), *images)


def test_what_a_block_sees_is_looked_at_only_where_images_appear_or_go(monkeypatch):
    """At 131,000 tokens and 60 pictures the loop stood still for 0.9 s."""
    looked, view = [], prefix._view
    monkeypatch.setattr(prefix, "_view", lambda *args: looked.append(args[2]) or view(*args))
    keys_of(range(400), ("p1", ImageSpan(50, 120)), ("q1", ImageSpan(200)))
    assert looked == [0, 48, 52, 120, 200]


@given(pictures(num_tokens=40), st.sets(st.sampled_from(["p1", "q1", "q2"])), st.integers(1, 3))
def test_a_prefix_is_cut_as_little_as_need_be(images, encoded, max_num_images):
    bench = Bench(num_image_blocks=16)
    bench.ask(ask_for(range(40), *[one for one in images if one[0] in encoded]))
    sequence = Sequence("a", 0, ask_for(range(40), *images))
    blocks = bench.scheduler.blocks
    missing = [name not in encoded for name, _ in images]

    def num_due(num_blocks: int) -> int:
        position = num_blocks * BLOCK_SIZE
        return len({one[0] for one, due in zip(images, missing, strict=True)
                    if due and one[1].covers(position)})  # fmt: skip

    fitting = [num for num in range(1, 10) if num_due(num) <= max_num_images]
    assert blocks._num_usable(sequence, 9, max_num_images) == max(fitting, default=0)


def test_an_image_marks_the_blocks_that_see_it_and_all_behind_them():
    plain, seeing = keys_of(range(16)), keys_of(range(16), ("p1", ImageSpan(5, 8)))
    assert [one == other for one, other in zip(plain, seeing, strict=True)] == [
        True,
        False,
        False,
        False,
    ]


# The pool


def test_a_shared_prefix_is_evicted_last():
    pool = TextPool(4)
    block_ids = pool.allocate(3)
    for block_id, key in zip(block_ids, [b"a", b"b", b"c"], strict=True):
        pool.commit(block_id, key)
    pool.free(block_ids)
    pool.check()
    counts = pool.snapshot()
    assert (counts.free, counts.cached, counts.used) == (1, 3, 0)
    held = pool.allocate(2)
    pool.check()
    assert pool.find([b"a", b"b", b"c"]) == block_ids[:2]
    pool.free(held)
    pool.allocate(3)
    assert pool.find([b"a", b"b"]) == block_ids[:1]


def test_shared_blocks_cannot_be_evicted_and_count_against_the_room():
    pool = TextPool(3)
    block_ids = pool.allocate(2)
    pool.commit(block_ids[0], b"a")
    pool.free(block_ids)
    found = pool.find([b"a"])
    assert pool.can_allocate(2, len(found))
    assert not pool.can_allocate(3, len(found))
    pool.share(found)
    pool.share(found)
    with pytest.raises(OutOfBlocksError, match="3 blocks requested, 2 are available"):
        pool.allocate(3)
    pool.free(found)
    pool.check()
    assert pool.snapshot().used == 1
    pool.free(found)
    pool.check()
    assert pool.snapshot().cached == 1
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(found)


def test_a_second_block_of_the_same_content_stays_its_owners_alone():
    pool = TextPool(2)
    first, second = pool.allocate(1), pool.allocate(1)
    pool.commit(first[0], b"a")
    pool.commit(second[0], b"a")
    pool.free(second)
    pool.check()
    assert pool.snapshot().free == 1
    assert pool.find([b"a"]) == first
