"""Steps with drafts: the same tokens in fewer steps, and every block is free afterwards."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace
from support.fake_runner import expected_token_ids, fake_image
from support.scheduler_bench import Bench

from vlmserve.models.batch import ImageSpan, PoolSizes, SamplingParams, StepBatch
from vlmserve.models.sampling.token_counts import TokenCounts
from vlmserve.router.messages import AddRequest
from vlmserve.router.scheduler.drafts.draft_source import DraftSource
from vlmserve.router.scheduler.sequence import Sequence

PENALTIES = SamplingParams(
    repetition_penalty=1.1, frequency_penalty=0.1, min_tokens=3, banned_sequences=((8, 9), (5,))
)


def request(name: str, **fields) -> AddRequest:
    made = AddRequest(
        request_id=name, prompt_token_ids=[1, 2, 3] * 4, max_tokens=40, eos_token_ids=[]
    )
    return replace(made, **fields)


def alike(batch: StepBatch) -> float:
    return 1.0


def by_tokens(batch: StepBatch) -> float:
    return float(batch.num_tokens)


def bench_of(num_drafts: int, **fields) -> Bench:
    fields = {"max_num_batched_tokens": 64, "repeats": True, "seconds_of": alike} | fields
    return Bench(num_speculative_tokens=num_drafts, **fields)


@pytest.mark.parametrize("num_drafts", [0, 1, 3, 8])
def test_drafts_give_the_same_tokens_in_fewer_steps(num_drafts: int) -> None:
    bench = bench_of(num_drafts)
    one = request("a")
    bench.add(one)
    bench.run()
    assert bench.tokens["a"] == expected_token_ids(one, repeats=True)
    bench.assert_all_free()
    counts = bench.scheduler.counts().drafts
    assert counts.num_tokens == bench.runner.num_drafts
    assert counts.num_accepted <= bench.runner.num_right_drafts
    assert counts.num_rows <= bench.runner.num_steps == 40 - counts.num_accepted
    assert (counts.num_accepted > 4) == (num_drafts > 0)


def test_the_times_of_steps_decide_whether_many_requests_have_drafts() -> None:
    num_drafts = {}
    for curve in (alike, by_tokens):
        limits = {"max_num_seqs": 8, "max_model_len": 120, "seconds_of": curve}
        bench = bench_of(8, pools=PoolSizes(600, 8, 4), **limits)
        made = [
            request(str(number), sampling=SamplingParams(seed=number), max_tokens=80)
            for number in range(8)
        ]
        for one in made:
            bench.add(one)
        bench.run()
        for one in made:
            assert bench.tokens[one.request_id] == expected_token_ids(one, repeats=True)
        assert bench.runner.max_batched_tokens <= 64
        num_drafts[curve] = bench.runner.num_drafts
    assert num_drafts[alike] > 2 * num_drafts[by_tokens] > 0


@pytest.mark.parametrize(
    ("num_requests", "seconds_of", "least", "most"),
    [
        (1, by_tokens, 0.9, 1.0),
        (16, alike, 0.6, 1.0),
        (16, by_tokens, 0.05, 0.25),
        (64, alike, 0, 0),
    ],
    ids=["one", "many", "many, of linear times", "as many as tokens of a step"],
)
def test_texts_are_looked_up_less_often_where_drafts_are_not_worth_it(
    monkeypatch: pytest.MonkeyPatch, num_requests: int, seconds_of, least: float, most: float
) -> None:
    num_calls = 0
    next_drafts = DraftSource.next

    def counted(*args):
        nonlocal num_calls
        num_calls += 1
        return next_drafts(*args)

    monkeypatch.setattr(DraftSource, "next", counted)
    bench = bench_of(
        8,
        pools=PoolSizes(4000, 8, 4),
        max_num_seqs=64,
        max_num_batched_tokens=1024,
        max_model_len=220,
        seconds_of=seconds_of,
    )
    for number in range(num_requests):
        bench.add(request(str(number), sampling=SamplingParams(seed=number), max_tokens=200))
    bench.run()
    looked_up = num_calls / num_requests / bench.runner.num_steps
    assert least <= looked_up <= most
    assert (bench.runner.num_drafts > 0) == (most > 0)


def test_a_step_with_a_chunk_has_no_drafts() -> None:
    bench = bench_of(8, max_num_batched_tokens=9, max_model_len=200)
    bench.add(request("a"))
    for _ in range(4):
        bench.step()
    bench.add(request("b", prompt_token_ids=list(range(100))))
    batches = [bench.plan()]
    while len(batches[-1].sequences) == 2 and len(batches[-1].sequences[1].token_ids) > 1:
        assert batches[-1].sequences[0].num_drafts == 0
        bench.finish(batches[-1])
        batches.append(bench.plan())
    assert len(batches) > 10
    bench.finish(batches[-1])
    bench.run()
    assert bench.runner.num_right_drafts > 0


@pytest.mark.parametrize("num_blocks", [12, 14, 20])
@pytest.mark.parametrize("plans_ahead", [False, True])
def test_drafts_preempt_nothing_and_leave_no_block_behind(
    num_blocks: int, plans_ahead: bool
) -> None:
    preemptions = []
    for num_drafts in (0, 8):
        bench = bench_of(num_drafts, pools=PoolSizes(num_blocks, 8, 4), plans_ahead=plans_ahead)
        made = [request(name, sampling=SamplingParams(seed=ord(name)), max_tokens=20)
                for name in "ab"]  # fmt: skip
        for one in made:
            bench.add(one)
        bench.run()
        for one in made:
            assert bench.tokens[one.request_id] == expected_token_ids(one, repeats=True)
        bench.assert_all_free()
        preemptions.append(bench.scheduler.snapshot().num_preemptions)
    assert bench.runner.num_right_drafts > 0
    assert preemptions[1] <= preemptions[0] + 1


def test_an_answer_ends_at_a_stop_token_among_right_drafts() -> None:
    whole = expected_token_ids(request("a"), repeats=True)
    stop = next(one for one in whole[12:] if one > 4 and one not in whole[:12])
    one = request("a", stop_token_ids=[stop])
    bench = bench_of(8)
    bench.add(one)
    bench.run()
    assert bench.tokens["a"] == whole[: whole.index(stop) + 1]
    assert bench.endings["a"] == "stop"
    bench.assert_all_free()


def test_only_tokens_of_the_answer_are_found_by_the_prefix_cache() -> None:
    """A wrong draft's block must not be found: the second request continues the first one's."""
    bench = bench_of(8, pools=PoolSizes(64, 8, 4), max_model_len=64)
    first = request("a", max_tokens=30)
    bench.add(first)
    bench.run()
    text = first.prompt_token_ids + bench.tokens["a"]
    second = request("b", prompt_token_ids=text, max_tokens=8)
    bench.add(second)
    bench.run()
    assert bench.scheduler.blocks.num_prefix_tokens_hit >= len(text) - 5
    assert bench.tokens["b"] == expected_token_ids(second, repeats=True)
    assert bench.runner.num_drafts > bench.runner.num_right_drafts > 0


def test_drafts_see_the_images_that_the_answer_sees() -> None:
    one = request("a", images=[fake_image("p", 2)], spans=[ImageSpan(3)])
    bench = bench_of(8)
    bench.add(one)
    bench.run()
    assert bench.tokens["a"] == expected_token_ids(one, repeats=True)
    assert bench.runner.num_right_drafts > 0


def test_the_contexts_behind_drafts_are_those_of_the_sequence_with_them() -> None:
    def sequence_of(generated: list[int]) -> Sequence:
        (made,) = Sequence.of(0, request("a", sampling=PENALTIES, stop_token_ids=[77]))
        made.extend(generated, 1000)
        return made

    drafts = [8, 6, 9, 8]
    for generated in ([7], [7, 8], [7, 8, 9, 9]):
        sequence = sequence_of(generated)
        for count in range(len(drafts) + 1):
            found = sequence.sampling_context(drafts[:count])
            expected = sequence_of(generated + drafts[:count]).sampling_context()
            assert found is not None
            assert expected is not None
            assert sorted(found.banned_token_ids) == sorted(expected.banned_token_ids)
            assert list(found.generated_token_ids) == list(expected.generated_token_ids)
            assert list(found.generated_counts) == list(expected.generated_counts)
        assert list(sequence.generated.token_ids) == list(dict.fromkeys(generated))


def test_counts_after_tokens_are_a_copy() -> None:
    counts = TokenCounts()
    counts.add(5)
    after = counts.after([6, 5, 6, 6])
    assert dict(zip(after.token_ids, after.counts, strict=True)) == {5: 2, 6: 3}
    assert dict(zip(counts.token_ids, counts.counts, strict=True)) == {5: 1}


def random_mix(number: int, num_requests: int) -> None:
    """Requests on tiny pools, some of which leave: each must answer as alone."""
    rng = np.random.default_rng(number)
    bench = bench_of(
        int(rng.integers(1, 10)),
        pools=PoolSizes(int(rng.integers(12, 30)), 8, 4),
        max_num_seqs=int(rng.integers(1, 7)),
        max_num_batched_tokens=int(rng.integers(8, 40)),
        plans_ahead=bool(rng.integers(2)),
        max_model_len=44,
    )
    made = [random_request(rng, str(i)) for i in range(num_requests)]
    due, gone = list(made), set()
    while due or bench.scheduler.has_work:
        for one in due[: int(rng.integers(0, 3))]:
            bench.add(one)
            due.remove(one)
        batch = bench.plan()
        if rng.random() < 0.1 and bench.sequences:
            gone.add(name := str(rng.choice(sorted(bench.sequences))))
            bench.abort(name)
        if batch is not None:
            bench.finish(batch)
    for one in made:
        alone = expected_token_ids(one, repeats=True)[: 44 - len(one.prompt_token_ids)]
        got = bench.tokens[one.request_id]
        assert got == (alone[: len(got)] if one.request_id in gone else alone)
    assert bench.runner.num_drafts > 0
    bench.assert_all_free()


def random_request(rng: np.random.Generator, name: str) -> AddRequest:
    return request(
        name,
        prompt_token_ids=rng.integers(0, 4, int(rng.integers(1, 16))).tolist(),
        max_tokens=int(rng.integers(1, 30)),
        sampling=SamplingParams(seed=int(rng.integers(3))),
        stop_token_ids=list(range(4, 1000, 17)) if rng.random() < 0.3 else [],
        images=[fake_image("p", 2)] if (has_image := rng.random() < 0.3) else [],
        spans=[ImageSpan(0)] if has_image else [],
    )


def test_random_mixes_with_drafts_answer_as_alone() -> None:
    for number in range(3):
        random_mix(number, num_requests=6)


@pytest.mark.soak
def test_ten_thousand_requests_with_drafts_answer_as_alone() -> None:
    for number in range(500):
        random_mix(number, num_requests=20)
