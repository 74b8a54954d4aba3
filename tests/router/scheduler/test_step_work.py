"""The host's work of a step does not grow with the context."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from support.counted_list import CountedList
from support.scheduler_bench import Bench

from vlmserve.models.batch import PoolSizes, SamplingParams, StepBatch, StepResult
from vlmserve.models.kv_cache.block_table import extremes
from vlmserve.models.kv_cache.step_inputs import pack
from vlmserve.router.messages import AddRequest
from vlmserve.router.scheduler.batch_rows import fill, row_of
from vlmserve.router.scheduler.sequence import Sequence

BLOCK_SIZE = 16
NUM_SEQUENCES = 64
PLAIN = SamplingParams()
PENALTIES = SamplingParams(
    repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.1, banned_sequences=((8, 9),)
)


def calls_of(run: Callable[[], None]) -> int:
    """How many functions `run` calls, those of C included, without a garbage collection's."""
    num_calls = 0
    gc.disable()

    def count(_: Any, event: str, __: Any) -> None:
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return num_calls


def decoding(
    number: int,
    num_tokens: int,
    sampling: SamplingParams = PLAIN,
    num_generated: int = 0,
) -> Sequence:
    """A sequence of that many tokens whose last one is not computed yet."""
    request = AddRequest(
        request_id=str(number),
        prompt_token_ids=[7] * (num_tokens - num_generated),
        sampling=sampling,
        max_tokens=100_000,
        eos_token_ids=[],
    )
    (sequence,) = Sequence.of(0, request)
    for _ in range(num_generated):
        sequence.append(8, max_model_len=100_000)
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    sequence.block_ids = CountedList(range(number * num_blocks, (number + 1) * num_blocks))
    sequence.token_ids = CountedList(sequence.token_ids)
    return sequence


def run_step(sequences: list[Sequence]) -> None:
    """What the scheduler and the runner do for each row before the model runs."""
    rows = []
    for sequence in sequences:
        end = sequence.num_tokens
        rows.append(row_of(sequence, end - 1, end, len(sequence.block_ids)))
        fill(rows[-1], sequence)
        assert min(extremes(rows[-1].block_ids)) >= 0
    inputs = pack(StepBatch(rows), BLOCK_SIZE, num_patches=17)
    assert inputs.text_rows.key_lens.tolist() == [sequence.num_tokens for sequence in sequences]


def counted(num_tokens: int, sampling: SamplingParams, num_generated: int) -> tuple[int, int]:
    """Elements of lists that the second step reads, and functions that it calls."""
    sequences = [
        decoding(number, num_tokens, sampling, num_generated) for number in range(NUM_SEQUENCES)
    ]
    run_step(sequences)
    for sequence in sequences:
        sequence.block_ids += [0]
        sequence.token_ids.num_read = sequence.block_ids.num_read = 0

    def append_and_run() -> None:
        for sequence in sequences:
            sequence.append(8, max_model_len=100_000)
        run_step(sequences)

    num_calls = calls_of(append_and_run)
    lists = [one for sequence in sequences for one in (sequence.token_ids, sequence.block_ids)]
    return sum(one.num_read for one in lists), num_calls


@pytest.mark.parametrize("sampling", [PLAIN, PENALTIES], ids=["plain", "penalties"])
def test_a_step_of_long_sequences_reads_as_much_as_one_of_short_ones(
    sampling: SamplingParams,
) -> None:
    """Each block was read in every step, 2,048 of them for each of 64 sequences; with penalties
    each token of the answer too."""
    short, long = counted(128, sampling, 64), counted(32_768, sampling, 16_384)
    assert short == long
    num_compared = 2 if sampling.banned_sequences else 0  # the end of the answer and a ban's start
    assert short[0] == NUM_SEQUENCES * (2 + num_compared)  # the new token and the new block


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_the_counts_are_those_of_the_answer_after_preemptions_and_for_each_choice(
    prefix_cache: bool,
) -> None:
    bench = Bench(
        PoolSizes(10, 4, 4), max_model_len=40, prefix_cache=prefix_cache, plans_ahead=True
    )
    sampling = SamplingParams(temperature=0.0, frequency_penalty=0.5, repetition_penalty=1.2)
    for name in "ab":
        bench.add(
            AddRequest(
                request_id=name, prompt_token_ids=[1, 2, 3, 3], max_tokens=12, sampling=sampling,
                choice_ids=[f"{name}1", f"{name}2"],
            )
        )  # fmt: skip
    num_rows = 0
    while (batch := bench.plan()) is not None:
        for row in batch.sequences:
            if row.sampling is not None:
                assert row.context is not None
                answer = bench.tokens[row.request_id]
                counts = zip(
                    row.context.generated_token_ids, row.context.generated_counts, strict=True
                )
                assert dict(counts) == Counter(answer)
                assert sorted(row.context.prompt_token_ids) == [1, 2, 3]
                num_rows += 1
        bench.finish(batch)
    assert num_rows >= 6 * 12
    assert bench.num_lost_runs > 0


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 40])
def test_the_slots_are_those_of_the_last_blocks(num_tokens: int) -> None:
    sequence = decoding(3, num_tokens)
    row = row_of(sequence, num_tokens - 1, num_tokens, len(sequence.block_ids))
    (slot,) = pack(StepBatch([row]), BLOCK_SIZE, num_patches=17).text_slots
    last = num_tokens - 1
    assert slot == sequence.block_ids[last // BLOCK_SIZE] * BLOCK_SIZE + last % BLOCK_SIZE


@pytest.mark.parametrize("owner", ["", "another key"])
def test_the_head_of_the_queue_is_looked_up_once(owner: str) -> None:
    """Each cached block of a prompt that waits was looked up, and counted, in every step."""
    short, long = calls_while_waiting(128, owner), calls_while_waiting(32_768, owner)
    assert short == long


def calls_while_waiting(num_cached: int, owner: str) -> int:
    """Functions that one more plan calls while a prompt waits with this many cached tokens."""
    num_blocks = num_cached // BLOCK_SIZE + 9
    bench = Bench(
        PoolSizes(num_blocks, 4, BLOCK_SIZE), max_model_len=40_000, max_num_batched_tokens=40_000
    )
    shared = [7] * num_cached
    bench.add(AddRequest(request_id="first", prompt_token_ids=shared, max_tokens=1))
    step(bench)
    bench.add(AddRequest(request_id="running", prompt_token_ids=[8] * 64, max_tokens=60))
    step(bench)
    more = [9] * BLOCK_SIZE * 8
    bench.add(
        AddRequest(
            request_id="waiting", prompt_token_ids=shared + more, max_tokens=1, owner=owner
        )
    )  # fmt: skip
    step(bench)
    num_calls = calls_of(lambda: step(bench))
    assert bench.scheduler.snapshot().waiting == ("waiting",)
    assert len(bench.sequences["waiting"].full_block_keys(BLOCK_SIZE)) == num_blocks - 1
    return num_calls


def step(bench: Bench) -> None:
    """One step, without computing it."""
    batch = bench.scheduler.schedule()
    assert batch is not None
    sampled = [one.request_id for one in batch.sequences if one.sampling is not None]
    bench.scheduler.update(StepResult(dict.fromkeys(sampled, 5)))
