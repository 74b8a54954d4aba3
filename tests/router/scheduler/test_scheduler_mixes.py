"""Any mix of requests on tiny pools is answered as if each were alone, whatever leaves or fails.

The runner hashes what each position may see. The expected answer comes from the request's
spans alone (`expected_token_ids`), so a wrong block, segment, chunk or recomputation changes
a request's tokens.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from support.fake_runner import (
    expected_prompt_logprobs,
    expected_token_ids,
    fake_adapter,
    fake_image,
)
from support.scheduler_bench import Bench

from vlmserve.models.batch import ImageSpan, PoolSizes, SamplingParams, StepBatch
from vlmserve.router.messages import AddRequest, OwnerPolicy

ADAPTERS = [None, None, *map(fake_adapter, ("text", "images", "both", "text2"))]
POLICIES = {
    "": OwnerPolicy(),
    "x": OwnerPolicy(weight=3.0),
    "y": OwnerPolicy(weight=0.5, cross_priority=True),
}


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
        owner=(owner := draw(st.sampled_from(["", "", "x", "y"]))),
        policy=POLICIES[owner],
        num_prompt_logprobs=draw(st.sampled_from([None, None, 0])),
        # Compiled after so many steps.
        grammar=draw(st.sampled_from([None, None, None, "0", "3", "8"])),
        adapter=draw(st.sampled_from(ADAPTERS)),
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
        image_cost_tokens=draw(st.integers(0, 30)),
        num_image_layers=draw(st.integers(1, 5)),
        plans_ahead=draw(st.booleans()),
        tiles_after=draw(st.sampled_from([None, 0, 1, 4])),
        max_loras=draw(st.integers(1, 3)),
        num_speculative_tokens=draw(st.sampled_from([0, 1, 3, 8])),
        repeats=draw(st.booleans()),
    )
    count = draw(st.integers(1, 7))
    plan = []
    for number in range(count):
        request = draw(requests(str(number), max_model_len, pools.num_image_blocks))
        arrives_at = draw(st.integers(0, 12))
        aborts_after = draw(st.none() | st.integers(0, 10))
        plan.append((arrives_at, request, aborts_after))
    failing = draw(st.just(set()) | st.sets(st.integers(0, 25), max_size=3))
    return bench, plan, failing


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
@settings(quiet, max_examples=1000)
def test_a_thousand_mixes_answer_as_if_alone(scenario, aborts_in_step):
    run_mix(scenario, aborts_in_step)


@pytest.mark.torture
@mixes
@settings(quiet, max_examples=10_000)
def test_ten_thousand_mixes_answer_as_if_alone(scenario, aborts_in_step):
    run_mix(scenario, aborts_in_step)


def run_mix(scenario, aborts_in_step: bool) -> None:
    bench, plan, failing = scenario
    aborted: set[str] = set()
    last_arrival = max(ready_at(arrives_at, request) for arrives_at, request, _ in plan)
    now = 0
    while now <= last_arrival or bench.scheduler.has_work or bench.has_coming:
        for arrives_at, request, _ in plan:
            if arrives_at == now:
                bench.add(request)
            if request.grammar is not None and ready_at(arrives_at, request) == now:
                bench.make_ready(request)
        batch = bench.plan() if aborts_in_step else None
        abort_some(bench, plan, now, aborted)
        batch = batch if aborts_in_step else bench.plan()
        if batch is not None and now in failing:
            bench.fail(batch, is_computed=now % 2 == 0)
        elif batch is not None:
            take_step(bench, batch)
        now += 1
        assert now < 5000, "the requests do not finish"
    for _, request, _ in plan:
        assert_answered_as_if_alone(bench, request, aborted)
    assert bench.runner.num_restarts <= bench.scheduler.snapshot().num_preemptions
    if not aborted and not failing and not bench.prefix_cache:
        assert bench.runner.num_restarts == bench.num_lost_runs
        if not any(request.choice_ids for _, request, _ in plan):
            assert bench.num_lost_runs == bench.scheduler.snapshot().num_preemptions
    bench.assert_all_free()


def ready_at(arrives_at: int, request: AddRequest) -> int:
    """When its grammar is compiled."""
    return arrives_at + int(request.grammar or 0)


def abort_some(bench: Bench, plan, now: int, aborted: set[str]) -> None:
    """Let those leave whose time has come: all choices of a request, or every second one."""
    for arrives_at, request, aborts_after in plan:
        if aborts_after is not None and arrives_at + aborts_after == now:
            for request_id in request.answer_ids[:: 1 + (aborts_after % 2)]:
                aborted.add(request_id)
                bench.abort(request_id)


def take_step(bench: Bench, batch: StepBatch) -> None:
    assert 0 < batch.num_tokens <= bench.max_num_batched_tokens
    assert len(batch.sequences) <= bench.max_num_seqs
    assert len(batch.images) <= bench.max_num_batched_images
    assert_streams_wait_no_longer_than_for_a_chunk(bench, batch)
    bench.finish(batch)


def assert_streams_wait_no_longer_than_for_a_chunk(bench: Bench, batch: StepBatch) -> None:
    """All that it computes costs no more than a full chunk, but for a single layer that does."""
    num_layers = bench.num_image_layers
    parts = [(due.end or num_layers) - due.begin for due in batch.images]
    if not bench.streams(batch) or parts == [1]:
        return
    cost = sum(part * bench.image_cost_tokens for part in parts) / num_layers
    assert batch.num_tokens + cost <= bench.max_num_batched_tokens


def assert_answered_as_if_alone(bench: Bench, request: AddRequest, aborted: set[str]) -> None:
    for choice, request_id in enumerate(request.answer_ids):
        seed = bench.sequences[request_id].sampling.seed
        assert (choice == 0) == (seed == request.sampling.seed)
        alone = replace(
            request, sampling=SamplingParams(seed=seed), request_id=request_id, choice_ids=[]
        )
        if choice:
            alone = replace(alone, num_prompt_logprobs=None)  # the first tells for all
        assert_choice_as_if_alone(bench, alone, aborted)


def assert_choice_as_if_alone(bench: Bench, request: AddRequest, aborted: set[str]) -> None:
    got, ending = bench.tokens[request.request_id], bench.endings[request.request_id]
    room = bench.limits.max_model_len - len(request.prompt_token_ids)
    alone = expected_token_ids(request, repeats=bench.repeats)[:room]
    if got:
        is_told = request.num_prompt_logprobs is not None
        told = expected_prompt_logprobs(request) if is_told else None
        assert bench.sequences[request.request_id].prompt_logprobs == told
    if ending in ("abort", "failed"):
        assert ending == "failed" or request.request_id in aborted
        assert got == alone[: len(got)]
        return
    assert got == alone
    ends = {*request.eos_token_ids, *request.stop_token_ids}
    assert ending == ("stop" if got[-1] in ends else "length")
