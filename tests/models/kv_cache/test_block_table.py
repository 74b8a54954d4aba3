"""A sequence's blocks as an array: what views show, and that no id is read twice."""

from __future__ import annotations

import numpy as np
from support.counted_list import CountedList

from vlmserve.models.batch import ScheduledSequence, StepBatch
from vlmserve.models.distributed.wire import RankStep, frame_of, step_decoder
from vlmserve.models.kv_cache.block_table import BlockTable, extremes
from vlmserve.models.kv_cache.step_inputs import as_array


def test_a_view_is_the_start_of_the_list_and_stays_as_it_was() -> None:
    table, block_ids = BlockTable(), [5, 3]
    first = table.first(block_ids, 1)
    for block_id in range(100, 200):
        block_ids += [block_id]
        assert table.first(block_ids, len(block_ids)) == block_ids
    assert first == [5]
    assert as_array(first).dtype == np.int32
    assert table.first(block_ids, 4)[1:] == [3, 100, 101]
    assert table.first(block_ids, 1000) == block_ids


def test_another_list_starts_it_anew() -> None:
    """As after a preemption, when the sequence gets other blocks."""
    table = BlockTable()
    assert table.first([1, 2, 3], 3) == [1, 2, 3]
    assert table.first([4, 5, 6], 3) == [4, 5, 6]
    assert table.first([], 3) == []


def test_extremes_are_those_of_every_id() -> None:
    table, block_ids = BlockTable(), [7]
    assert extremes(table.first(block_ids, 1)) == (7, 7)
    block_ids += [9, -1]
    assert extremes(table.first(block_ids, 3)) == (-1, 9)
    assert extremes(table.first([], 0)) == ()
    assert extremes([3, 1]) == [3, 1]


def test_ids_are_read_once_however_many_there_are() -> None:
    table = BlockTable()
    block_ids = CountedList(range(2048))
    table.first(block_ids, 2048)
    assert block_ids.num_read == 2048
    block_ids.extend([9])
    for _ in range(10):
        table.first(block_ids, 2049)
    assert block_ids.num_read == 2049


def test_an_array_of_a_view_is_no_copy() -> None:
    view = BlockTable().first([1, 2, 3], 3)
    assert np.shares_memory(as_array(view, 1), np.frombuffer(view.ids, np.int32))
    assert as_array([1, 2, 3], 1).tolist() == as_array(view, 1).tolist() == [2, 3]


def test_other_ranks_get_a_view_as_a_list() -> None:
    row = ScheduledSequence("a", [1], 16, BlockTable().first([4, 2], 2), [])
    received = step_decoder.decode(frame_of(RankStep(StepBatch([row])))[4:]).batch
    assert received.sequences[0].block_ids == [4, 2]
