"""The scheduler over the two pools, with a runner that hashes what each position may see.

The expected answer comes from the request's spans alone (`expected_token_ids`), so a
wrong block, segment, chunk or recomputation changes a request's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from support.fake_runner import (
    FakeRunner,
    expected_prompt_logprobs,
    expected_token_ids,
    fake_image,
    fake_info,
)

from vlmserve.models.batch import ImageSpan, PoolSizes, SamplingParams, StepBatch
from vlmserve.router.admission import AdmissionLimits, check_request
from vlmserve.router.errors import InvalidRequestError
from vlmserve.router.messages import AddRequest
from vlmserve.router.queue import QueueLimits, RequestQueue
from vlmserve.router.scheduler import Scheduler, SchedulerLimits
from vlmserve.router.sequence import Sequence


@dataclass
class Bench:
    """A scheduler, its queue and a fake runner, stepped by hand."""

    pools: PoolSizes = field(default_factory=lambda: PoolSizes(32, 8, 4))
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 16
    max_num_batched_images: int = 4
    max_model_len: int = 64
    prefix_cache: bool = True
    image_cache: bool = True

    def __post_init__(self) -> None:
        self.runner = FakeRunner(fake_info(self.pools, self.max_model_len))
        self.queue = RequestQueue(QueueLimits(1000, 10**6, 10**9))
        self.limits = AdmissionLimits.of(self.runner.info)
        limits = SchedulerLimits(
            self.max_num_seqs,
            self.max_num_batched_tokens,
            self.max_num_batched_images,
            self.limits.max_model_len,
            self.prefix_cache,
            self.image_cache,
        )
        self.scheduler = Scheduler(self.runner.info, limits, self.queue)
        self.tokens: dict[str, list[int]] = {}
        self.endings: dict[str, str] = {}
        self.sequences: dict[str, Sequence] = {}
        self.failing_steps: set[int] = set()

    def add(self, request: AddRequest) -> Sequence:
        check_request(request, self.limits)
        sequences = Sequence.of(0, request)
        self.queue.put(sequences[0])
        for sequence in sequences:
            sequence.sequence_id = sequence.request_id
            self.tokens[sequence.request_id] = []
            self.sequences[sequence.request_id] = sequence
        return sequences[0]

    def plan(self) -> StepBatch | None:
        return self.scheduler.schedule()

    def finish(self, batch: StepBatch) -> None:
        for progress in self.scheduler.update(self.runner.execute(batch)):
            self._take(progress)
        self.scheduler.check()

    def fail(self) -> None:
        """The planned step fails: nothing of it is computed."""
        for sequence in self.scheduler.fail_step():
            assert sequence.sequence_id not in self.endings, "an end after the last one"
            self.endings[sequence.sequence_id] = "failed"
        self.scheduler.check()

    def step(self) -> StepBatch | None:
        batch = self.plan()
        if batch is not None:
            self.finish(batch)
        return batch

    def abort(self, request_id: str) -> None:
        progress = self.scheduler.abort(self.sequences[request_id])
        if progress is not None:
            self._take(progress)

    def run(self, max_steps: int = 100_000) -> None:
        for _ in range(max_steps):
            if self.step() is None:
                return
        raise AssertionError("the requests do not finish")

    def _take(self, progress) -> None:
        request_id = progress.sequence.sequence_id
        assert request_id not in self.endings, "an output after the last one"
        self.tokens[request_id] += progress.token_ids
        if progress.finish_reason is not None:
            self.endings[request_id] = progress.finish_reason

    def assert_all_free(self) -> None:
        assert self.scheduler.blocks.text_pool.num_used == 0
        image_blocks = self.scheduler.blocks.image_pool.blocks
        assert image_blocks.num_used == 0
        assert len(self.queue) == self.queue.num_tokens == self.queue.num_bytes == 0
        self.scheduler.check()


def request_of(request_id="a", prompt=(1, 2, 3), max_tokens=4, **fields) -> AddRequest:
    return AddRequest(
        request_id=request_id, prompt_token_ids=list(prompt), max_tokens=max_tokens, **fields
    )


# Any mix of requests


@st.composite
def requests(draw, request_id: str, max_model_len: int, num_image_blocks: int) -> AddRequest:
    """A request that is admitted: prompt and images fit the model and the pools."""
    length = draw(st.integers(1, max_model_len - 1))
    starts = sorted(draw(st.sets(st.integers(0, length - 1), max_size=3)))
    images, spans = [], []
    for start in starts:
        name = draw(st.sampled_from("pqr"))
        images.append(fake_image(name, num_tiles=1 + "pqr".index(name)))
        spans.append(ImageSpan(start, draw(st.none() | st.integers(start + 1, length))))
    return AddRequest(
        request_id=request_id,
        prompt_token_ids=draw(st.lists(st.integers(0, 9), min_size=length, max_size=length)),
        images=images,
        spans=spans,
        sampling=SamplingParams(seed=draw(st.integers(0, 1))),
        max_tokens=draw(st.integers(1, 12)),
        eos_token_ids=draw(st.sampled_from([[], list(range(0, 1000, 5))])),
        stop_token_ids=draw(st.sampled_from([[], list(range(1, 1000, 7))])),
        tenant=draw(st.sampled_from(["", "t"])),
        choice_ids=draw(
            st.sampled_from([[], [], [f"{request_id}b"], [f"{request_id}b", f"{request_id}c"]])
        ),
        priority=draw(st.sampled_from([0, 0, 0, -1])),
        num_prompt_logprobs=draw(st.sampled_from([None, None, 0])),
    )


@st.composite
def scenarios(draw):
    block_size = draw(st.integers(1, 5))
    pools = PoolSizes(draw(st.integers(2, 14)), draw(st.integers(6, 8)), block_size)
    max_model_len = max(2, min(20, pools.num_text_blocks * block_size))
    bench = Bench(
        pools=pools,
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.integers(1, 12)),
        max_num_batched_images=draw(st.integers(1, 3)),
        max_model_len=max_model_len,
        prefix_cache=draw(st.booleans()),
        image_cache=draw(st.booleans()),
    )
    count = draw(st.integers(1, 7))
    plan = []
    for number in range(count):
        request = draw(requests(str(number), max_model_len, pools.num_image_blocks))
        arrives_at = draw(st.integers(0, 12))
        aborts_after = draw(st.none() | st.integers(0, 10))
        plan.append((arrives_at, request, aborts_after))
    bench.failing_steps = draw(st.just(set()) | st.sets(st.integers(0, 25), max_size=3))
    return bench, plan


mixes = given(scenarios(), st.booleans())
quiet = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@mixes
@settings(quiet, max_examples=100, derandomize=True)
def test_any_mix_of_arrivals_aborts_and_tiny_pools_answers_as_if_alone(scenario, aborts_in_step):
    run_mix(scenario, aborts_in_step)


@pytest.mark.slow
@mixes
@settings(quiet, max_examples=3000)
def test_thousands_of_mixes_answer_as_if_alone(scenario, aborts_in_step):
    run_mix(scenario, aborts_in_step)


def run_mix(scenario, aborts_in_step: bool) -> None:
    bench, plan = scenario
    aborted = set()
    last_arrival = max(arrives_at for arrives_at, _, _ in plan)
    now = 0
    while now <= last_arrival or bench.scheduler.has_work:
        for arrives_at, request, _ in plan:
            if arrives_at == now:
                bench.add(request)
        batch = bench.plan() if aborts_in_step else None
        for arrives_at, request, aborts_after in plan:
            if aborts_after is not None and arrives_at + aborts_after == now:
                for request_id in choices_of(request)[:: 1 + (aborts_after % 2)]:
                    aborted.add(request_id)
                    bench.abort(request_id)
        batch = batch or (None if aborts_in_step else bench.plan())
        if batch is not None:
            assert 0 < batch.num_tokens <= bench.max_num_batched_tokens
            assert len(batch.sequences) <= bench.max_num_seqs
            assert len(batch.images) <= bench.max_num_batched_images
            if now in bench.failing_steps:
                bench.fail()
            else:
                bench.finish(batch)
        now += 1
        assert now < 5000, "the requests do not finish"
    for _, request, _ in plan:
        assert_answered_as_if_alone(bench, request, aborted)
    assert bench.runner.num_restarts <= bench.scheduler.num_preemptions
    if not aborted and not bench.failing_steps and not bench.prefix_cache:
        assert bench.runner.num_restarts == bench.scheduler.num_preemptions
    bench.assert_all_free()


def assert_answered_as_if_alone(bench: Bench, request: AddRequest, aborted: set[str]) -> None:
    for choice, request_id in enumerate(choices_of(request)):
        seed = bench.sequences[request_id].sampling.seed
        assert (choice == 0) == (seed == request.sampling.seed)
        alone = replace(
            request, sampling=SamplingParams(seed=seed), request_id=request_id, choice_ids=[]
        )
        if choice:
            alone = replace(alone, num_prompt_logprobs=None)  # the first tells for all
        assert_choice_as_if_alone(bench, alone, aborted)


def choices_of(request: AddRequest) -> list[str]:
    return [request.request_id, *request.choice_ids]


def assert_choice_as_if_alone(bench: Bench, request: AddRequest, aborted: set[str]) -> None:
    got, ending = bench.tokens[request.request_id], bench.endings[request.request_id]
    room = bench.limits.max_model_len - len(request.prompt_token_ids)
    alone = expected_token_ids(request)[:room]
    if got:
        told = bench.sequences[request.request_id].prompt_logprobs
        is_told = request.num_prompt_logprobs is not None
        assert told == (expected_prompt_logprobs(request) if is_told else None)
    if ending in ("abort", "failed"):
        assert request.request_id in aborted if ending == "abort" else bench.failing_steps
        assert got == alone[: len(got)]
        return
    assert got == alone
    ends = {*request.eos_token_ids, *request.stop_token_ids}
    assert ending == ("stop" if got[-1] in ends else "length")


# One thing at a time


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


def test_a_preempted_request_runs_before_those_that_came_after_it():
    bench = Bench(pools=PoolSizes(6, 4, 4), max_model_len=24)
    for name in ("first", "second", "third"):
        bench.add(request_of(name, prompt=range(8), max_tokens=10))
    bench.run()
    assert bench.scheduler.num_preemptions > 0
    assert list(bench.endings) == ["first", "second", "third"]


def test_a_newcomer_leaves_each_running_sequence_a_block_to_grow_into():
    bench = Bench(pools=PoolSizes(4, 4, 4))
    bench.add(request_of("old", prompt=range(5), max_tokens=6))
    bench.step()
    # Two blocks are free and it needs two, but "old" is about to need a third.
    bench.add(request_of("new", prompt=range(10, 18), max_tokens=6))
    bench.run()
    assert bench.scheduler.num_preemptions == 0
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
    assert bench.scheduler.blocks.image_pool.blocks.num_used == 3
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
    assert bench.scheduler.blocks.image_pool.blocks.num_used == 3
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
        ({"images": [fake_image("p")], "spans": [ImageSpan(3)]}, "holds no token"),
        ({"images": [fake_image("p")], "spans": [ImageSpan(2, 2)]}, "holds no token"),
        ({"images": [fake_image("p")] * 2, "spans": [ImageSpan(1)] * 2}, "its own token"),
        ({"images": [fake_image("p", 5)], "spans": [ImageSpan(0)]}, "up to 4 of 2"),
        ({"images": [fake_image("p", 1, 3)], "spans": [ImageSpan(0)]}, "up to 4 of 2"),
        (
            {
                "images": [fake_image(n, 4) for n in "pqr"],
                "spans": [ImageSpan(0), ImageSpan(1), ImageSpan(2)],
            },
            "12 tiles; the cache holds 8",
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
