"""Recorded decode steps over ranks: the sums are recorded too, and all ranks record or none does.

Ranks are threads; a tape stands in for CUDA's graphs (support/taped.py), and its sums for NCCL's.
"""

from __future__ import annotations

import threading

import pytest
import torch
from support.oracle import BLOCK_SIZE, Blocks, checkpoint, join, loaded, prompt, requests, schedule
from support.taped import TapedGroup, TapeRecorder, taped_backend
from support.thread_ranks import ThreadGroup, on_ranks
from torch import Tensor

from vlmserve.models.batch import PoolSizes
from vlmserve.models.create_runner import _record_graphs
from vlmserve.models.execution.graphs.eligibility import why_not_over
from vlmserve.models.execution.graphs.recorder import Computation
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.kv_cache.pool_sizes import PoolPlan
from vlmserve.models.weights.loader import load_model

PLAN = PoolPlan(PoolSizes(60, 20, BLOCK_SIZE), 120)
CPU = torch.device("cpu")


def decode_logits(runner: ModelRunner) -> list[Tensor]:
    """Of five decode steps: of text alone, and beside a row that sees an image."""
    blocks, running = Blocks(PLAN.sizes, seed=3), [prompt("t", "word word"), *requests("one")]
    for request in running:
        runner.compute_logits(schedule(request, len(request.token_ids), blocks))
        request.token_ids.append(7)
    found = []
    for step, rows in enumerate((running, running[:1], running, running[1:], running)):
        found.append(runner.compute_logits(join([schedule(row, 1, blocks) for row in rows])))
        for row in rows:
            row.token_ids.append(20 + step)
    return found


@pytest.mark.slow
def test_replays_over_two_ranks_are_the_steps_of_one() -> None:
    """Every logit to 1e-4 in float32, and the ranks have the same bits."""
    loading = threading.Lock()

    def compute(group: ThreadGroup) -> list[Tensor]:
        recorder = TapeRecorder()
        taped = TapedGroup(group, recorder)
        with loading:
            model = load_model(checkpoint("tiny"), "cpu", "float32", group=taped)
        runner = ModelRunner(model, PLAN, taped_backend(recorder))
        assert runner.record_graphs(2, recorder).num_graphs == 4
        logits = decode_logits(runner)
        assert runner.num_replays == 5
        return logits

    first, second = on_ranks(2, compute)
    whole = decode_logits(ModelRunner(loaded("tiny"), PLAN))
    for expected, mine, others in zip(whole, first, second, strict=True):
        assert torch.equal(mine, others)
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)


class Refusing(TapeRecorder):
    """As NCCL with an old driver, or on a rank that is out of memory."""

    def record(self, compute: Computation) -> Computation:
        raise RuntimeError("operation not permitted when stream is capturing")


class Forgetful(TapeRecorder):
    """A replay computes nothing, as if the sum had run on a stream that is not captured."""

    def record(self, compute: Computation) -> Computation:
        output = compute()
        return lambda: output


@pytest.mark.parametrize(
    ("recorders", "reasons"),
    [
        ((TapeRecorder, TapeRecorder), (None, None)),
        ((Forgetful, Forgetful), ("a recorded sum over ranks was wrong",) * 2),
        (
            (TapeRecorder, Refusing),
            (
                "another rank cannot record them",
                "a sum over ranks cannot be recorded: operation not permitted when stream is "
                "capturing",
            ),
        ),
    ],
)
def test_a_small_recorded_sum_decides_for_all_ranks(recorders, reasons) -> None:
    def tried(group: ThreadGroup) -> str | None:
        recorder = recorders[group.rank]()
        taped = TapedGroup(group, recorder)
        if Refusing in recorders:  # one rank never comes to the sum
            taped.add_up = lambda states: states.mul_(group.size)
        return why_not_over(taped, recorder, CPU)

    assert tuple(on_ranks(2, tried)) == reasons


class OneStep:
    """A runner that can record, or cannot."""

    def __init__(self, error: Exception | None) -> None:
        self._error, self.has_graphs = error, False

    def record_graphs(self, max_num_seqs: int, recorder: object) -> None:
        if self._error is not None:
            raise self._error
        self.has_graphs = True

    def forget_graphs(self) -> None:
        self.has_graphs = False


def test_a_rank_that_cannot_record_leaves_all_ranks_eager(monkeypatch) -> None:
    monkeypatch.setattr("vlmserve.models.create_runner.CudaRecorder", lambda device: None)

    def record(group: ThreadGroup) -> tuple[str | None, bool]:
        runner = OneStep(RuntimeError("out of memory") if group.rank == 1 else None)
        return _record_graphs(runner, 4, torch.device("cuda", 0), group), runner.has_graphs

    first, second = on_ranks(2, record)
    assert first == ("another rank cannot record them", False)
    assert second == ("recording failed: out of memory", False)
