"""The counts of an answer's tokens, and that they cross to the ranks' processes."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from support.sampled import context_of

from vlmserve.models.batch import ScheduledSequence, StepBatch
from vlmserve.models.distributed.wire import RankStep, frame_of, step_decoder
from vlmserve.models.sampling.token_counts import DistinctIds, TokenCounts


@given(st.lists(st.integers(0, 5)))
def test_each_token_is_counted_as_often_as_it_came(token_ids: list[int]) -> None:
    counts = TokenCounts()
    for token_id in token_ids:
        counts.add(token_id)
    expected = Counter(token_ids)
    assert list(counts.token_ids) == list(expected)
    assert list(counts.counts) == list(expected.values())


def test_the_counts_cross_to_another_process() -> None:
    context = context_of(DistinctIds([2, 1, 2]), [4, 4, 5], [6])
    batch = StepBatch([ScheduledSequence("a", [5], 3, [0], [], context=context)])
    received = step_decoder.decode(frame_of(RankStep(batch))[4:]).batch.sequences[0].context
    assert received is not None
    assert sorted(received.prompt_token_ids) == [1, 2]
    assert received.generated_token_ids == [4, 5]
    assert received.generated_counts == [2, 1]
