"""Recorded decode steps against eager ones: every size and variant, with what changes in between.

On a CPU the kernels run in Triton's interpreter and a tape stands in for CUDA's graphs
(support/taped.py). Tolerance: 1e-5 in float32, as sums over keys are cut differently.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.oracle import (
    BLOCK_SIZE,
    Blocks,
    Request,
    checkpoint,
    image,
    join,
    loaded,
    prompt,
    requests,
    schedule,
)
from support.taped import TapeRecorder, tape_operations, taped_backend
from triton.runtime.errors import OutOfResources, PTXASError

from vlmserve.models.attention.sdpa import SdpaBackend
from vlmserve.models.attention.triton_paged import TritonBackend, TritonPlan
from vlmserve.models.attention.work_items import ALIGNMENT, WorkLayout
from vlmserve.models.batch import PoolSizes, StepBatch
from vlmserve.models.create_runner import _record_graphs
from vlmserve.models.decoder.decoder import FusedDecoder
from vlmserve.models.decoder.operations import TritonOperations
from vlmserve.models.execution.graphs.decode import (
    MAX_TABLE,
    DecodeGraphs,
    GraphLimits,
    _Buffer,
    _layout,
    padded_sizes,
)
from vlmserve.models.execution.graphs.eligibility import why_not, why_not_with
from vlmserve.models.execution.graphs.layout import Layout
from vlmserve.models.execution.graphs.recorder import Computation, CudaRecorder
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.kv_cache.pool_sizes import PoolPlan
from vlmserve.models.weights.loader import load_model

PLAN = PoolPlan(PoolSizes(200, 60, BLOCK_SIZE), 120)


class Pair:
    """Two runners of one model over the same sequences: one of torch's operations, eager, and one
    of kernels, with graphs."""

    def __init__(
        self, layout: str, monkeypatch: pytest.MonkeyPatch, max_num_seqs: int, piece: int | None
    ) -> None:
        recorder = TapeRecorder()
        tape_operations(recorder, monkeypatch)
        self.eager = ModelRunner(loaded(layout), PLAN)
        self.replaying = ModelRunner(loaded(layout), PLAN, taped_backend(recorder, piece))
        text_model = loaded(layout).model.model.language_model
        self.replaying._fused = FusedDecoder(text_model, TritonOperations())
        self.graphs: DecodeGraphs = self.replaying.record_graphs(max_num_seqs, recorder)
        self.blocks = Blocks(PLAN.sizes, seed=3)
        self.rng = np.random.default_rng(5)

    def prefill(self, running: Sequence[Request]) -> None:
        """Compute the prompts, for both, and append a token to each."""
        for request in running:
            self.eager.compute_logits(schedule(request, len(request.token_ids), self.blocks))
            self.append(request)
        pools = zip(self.replaying.pools.layers, self.eager.pools.layers, strict=True)
        for target, source in pools:
            target.keys.copy_(source.keys)
            target.values.copy_(source.values)

    def append(self, request: Request) -> None:
        request.token_ids.append(int(self.rng.integers(1, 700)))

    def decode(self, running: Sequence[Request]) -> None:
        """One token of each on both: alike, and replayed."""
        batch = join([schedule(request, 1, self.blocks) for request in running])
        expected = self.eager.compute_logits(batch)
        before = self.graphs.num_replays
        actual = self.replaying.compute_logits(batch)
        assert self.graphs.num_replays == before + 1
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        for request in running:
            self.append(request)

    def assert_same_keys(self) -> None:
        """Padding rows have written nowhere, and every row where it should."""
        pools = zip(self.replaying.pools.layers, self.eager.pools.layers, strict=True)
        for replayed, eager in pools:
            torch.testing.assert_close(replayed.keys, eager.keys, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(replayed.values, eager.values, atol=1e-5, rtol=1e-5)


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Pair:
    return Pair("tiny", monkeypatch, max_num_seqs=4, piece=None)


def texts(count: int) -> list[Request]:
    """Prompts of very different lengths."""
    return [prompt(f"t{i}", "word " * (1 + 3 * i)) for i in range(count)]


@pytest.mark.slow
def test_text_steps_of_every_size_are_those_of_eager_ones(pair: Pair) -> None:
    """In no order, so that each replay finds others' rows, longer tables and padding."""
    running = texts(4)
    pair.prefill(running)
    for count in (4, 1, 3, 2, 4, 1):
        pair.decode([running[i] for i in pair.rng.permutation(4)[:count]])
    pair.assert_same_keys()


@pytest.mark.slow
def test_mixed_steps_of_every_size_are_those_of_eager_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows that see one image, several or none, then text alone, then mixed again; keys split."""
    pair = Pair("tiny", monkeypatch, max_num_seqs=4, piece=16)
    words, seeing = texts(2), requests("three", "one")
    pair.prefill([*words, *seeing])
    for running in (
        [*words, *seeing],
        words,
        [seeing[0]],
        [seeing[1], words[0], seeing[0]],
        seeing,
    ):
        pair.decode(running)
    pair.assert_same_keys()


@pytest.mark.parametrize(
    ("layout", "largest"),
    [
        pytest.param("cross-first", 8, marks=pytest.mark.slow),
        pytest.param("one-kv-head", 8, marks=pytest.mark.slow),
        pytest.param("tiny", 16, marks=pytest.mark.torture),
    ],
)
def test_larger_steps_of_other_layouts_are_those_of_eager_ones(
    layout: str, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(layout, monkeypatch, max_num_seqs=largest, piece=24)
    running = [*texts(6), *requests("one", "adjacent", "three", "late", "apart")]
    pair.prefill(running)
    for count in (largest * 2 // 3, 5, largest // 2 + 1, 2, 7):
        pair.decode([running[i] for i in pair.rng.permutation(len(running))[:count]])
        pair.decode([running[i] for i in pair.rng.permutation(6)[:count]])
    pair.assert_same_keys()


@pytest.mark.slow
def test_a_row_is_replayed_alike_to_its_last_token(pair: Pair) -> None:
    """Up to the longest sequence, whose table is as wide as the graph's."""
    request = prompt("long", "x" * (PLAN.max_model_len - 2))
    pair.prefill([request])
    pair.decode([request])
    assert len(request.text_blocks) == -(-PLAN.max_model_len // BLOCK_SIZE)


def step(pair: Pair, running: Sequence[Request], count: int) -> StepBatch:
    return join([schedule(request, count, pair.blocks) for request in running])


def test_which_steps_are_replayed(pair: Pair) -> None:
    many = texts(5)
    for request in many:
        request.num_computed_tokens = len(request.token_ids) - 1
    pack = pair.replaying._pack
    assert pair.graphs.takes(pack(step(pair, many[:4], 1)))
    for request in many:
        request.num_computed_tokens -= 1
    assert not pair.graphs.takes(pack(step(pair, many, 1)))  # one row too many
    chunk = texts(2)
    assert not pair.graphs.takes(pack(step(pair, chunk, 2)))  # two tokens a row
    seeing = prompt("p", "||||||||| ", [image(4, seed) for seed in range(9)])
    for index in range(9):
        seeing.image_blocks.append(list(range(4 * index, 4 * index + 4)))
    seeing.num_computed_tokens = 9
    assert not pair.graphs.takes(pack(step(pair, [seeing], 1)))  # its table would be too wide


@pytest.mark.slow
def test_a_step_with_a_new_image_runs_eager(pair: Pair) -> None:
    """A prompt of one token that is the image: a single token, and not to be replayed."""
    before = pair.graphs.num_replays
    batch = schedule(prompt("p", "|", [image(1, 3)]), 1, pair.blocks)
    expected = pair.eager.compute_logits(batch)
    actual = pair.replaying.compute_logits(batch)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert pair.graphs.num_replays == before


@pytest.mark.slow
def test_a_replay_counts_the_layers_that_a_pass_begins(pair: Pair) -> None:
    """A watchdog would take a step of replays for one that hangs."""
    words, seeing = texts(1), requests("one")
    pair.prefill([*words, *seeing])
    for running in (words, [*words, *seeing]):
        counts = []
        batch = step(pair, running, 1)
        for runner in (pair.eager, pair.replaying):
            before = runner.num_layers_started
            runner.compute_logits(batch)
            counts.append(runner.num_layers_started - before)
        assert counts[0] == counts[1] > 0
        for request in running:
            pair.append(request)


def test_a_tape_would_show_a_number_that_python_keeps() -> None:
    """What the tests above rest on: a replay runs no Python, and reading back is refused."""
    given, seen = torch.ones(3), [1.0]
    recorder = TapeRecorder()
    replay = recorder.record(lambda: given * seen[0] + 1)
    given.fill_(5.0)
    seen[0] = 100.0
    assert replay().tolist() == [6.0] * 3
    with pytest.raises(AssertionError, match="cannot be captured"):
        recorder.record(lambda: given * float(given.sum()))


def test_what_replays_read_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph keeps no tensor: the plans' were freed, and replays read what came there."""

    class Forgetful(TapeRecorder):
        def record(self, compute: Computation) -> Computation:
            output = compute()
            return lambda: output

    made, fixed_plan = [], TritonBackend.fixed_plan

    def noted(*args: Any) -> TritonPlan:
        plan = fixed_plan(*args)
        tensors = [plan.query_starts]
        made.extend(weakref.ref(tensor) for tensor in tensors)
        return plan

    monkeypatch.setattr(TritonBackend, "fixed_plan", noted)
    runner = ModelRunner(loaded("tiny"), PLAN, TritonBackend())
    runner.record_graphs(1, Forgetful())
    gc.collect()
    assert len(made) == 3  # text alone has one plan, with images there are two
    assert all(reference() is not None for reference in made)


def test_sizes_go_up_to_the_most_sequences() -> None:
    assert padded_sizes(1) == [1]
    assert padded_sizes(6) == [1, 2, 4, 6]
    assert padded_sizes(64) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    assert padded_sizes(100)[-3:] == [64, 96, 100]
    assert padded_sizes(5000)[-1] == 256


def test_parts_of_a_layout_lie_apart_and_aligned() -> None:
    layout = Layout(5, 7, 3, WorkLayout(5, 9), WorkLayout(5, 5))
    buffer = np.zeros(layout.num_entries, dtype=np.int32)
    parts = layout.parts(buffer)
    works = [(layout.text_work, parts.text_work), (layout.cross_work, parts.cross_work)]
    named = [getattr(parts, name) for name in parts.__slots__ if "work" not in name]
    for work, part in works:
        views = work.views(part)
        named += [views.sizes, views.rows, views.pieces]
    named.append(layout.text_work.views(parts.text_work).split)
    for number, part in enumerate(named, start=1):
        part += number
    assert {int(value) for value in buffer} == set(range(17))  # each its own, gaps stay 0
    for part in named:
        start = (part.ctypes.data - buffer.ctypes.data) // buffer.itemsize
        assert start % ALIGNMENT == 0


def test_a_table_is_no_wider_than_what_is_copied_at_once() -> None:
    limits = GraphLimits(64, 131_072, 16, 4)
    layouts = [_layout(size, limits, 1601, TritonBackend()) for size in (1, 64)]
    assert layouts[0].text_width == 8192
    assert layouts[1].text_width * 64 == MAX_TABLE


@pytest.mark.slow
def test_a_replay_copies_the_used_width_of_the_text_table(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it was copied: 512 KiB a step for contexts of a few hundred tokens."""
    sent: list[int] = []
    send = _Buffer.send

    def noted(buffer: _Buffer, num_entries: int) -> None:
        sent.append(num_entries)
        send(buffer, num_entries)

    monkeypatch.setattr(_Buffer, "send", noted)
    running = texts(4)
    pair.prefill(running)
    for size, count in ((2, 2), (4, 3)):
        pair.decode(running[:count])
        (layout,) = [one for one in pair.graphs._layouts if one.size == size]
        width = max(len(one.text_blocks) for one in running[:count])
        assert width < layout.text_width / 2
        table = -(-size * layout.text_width // ALIGNMENT) * ALIGNMENT
        assert sent.pop() == layout.num_entries - table + count * width


@pytest.mark.slow
def test_a_staged_step_with_its_tokens_is_that_of_a_replay(pair: Pair) -> None:
    """Among others' rows: a staged step keeps nothing of the buffer that it is copied to."""
    running = [*texts(2), *requests("one")]
    pair.prefill(running)
    inputs = pair.replaying._pack(step(pair, running, 1))
    with torch.inference_mode():
        expected = pair.graphs.replay(inputs).states.clone()
        staged = pair.graphs.stage(replace(inputs, token_ids=np.zeros(3, dtype=np.int64)))
        for request in running:
            pair.append(request)
        pair.graphs.replay(pair.replaying._pack(step(pair, running[:2], 1)))
        assert staged is not None
        sampled = torch.cat([torch.tensor([-1]), torch.from_numpy(inputs.token_ids).flip(0)])
        actual = pair.graphs.replay_staged(staged, sampled, [3, 2, 1])
    assert torch.equal(actual.states, expected)
    assert actual.sampled is None


def test_a_cpu_has_no_graphs_and_says_why() -> None:
    model = loaded("tiny")
    assert why_not(model) == "they need a CUDA device, and this is cpu"
    assert why_not(model, is_asked=False) == "--no-cuda-graphs"
    assert why_not_with(taped_backend(TapeRecorder())) is None
    assert why_not_with(SdpaBackend()) == (
        "the attention backend is sdpa; they need --attention-backend triton"
    )


@pytest.mark.parametrize("error", [OutOfResources(114_944, 101_376, "shared memory"), PTXASError()])
def test_a_kernel_that_triton_refuses_while_recording_leaves_steps_eager(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """triton's errors are no RuntimeError; the start ended with them."""

    def refuse(*args: object) -> None:
        raise error

    assert not isinstance(error, RuntimeError)
    runner = ModelRunner(loaded("tiny"), PLAN)
    monkeypatch.setattr(ModelRunner, "record_graphs", refuse)
    monkeypatch.setattr("vlmserve.models.create_runner.CudaRecorder", lambda device: None)
    reason = _record_graphs(runner, 4, torch.device("cuda", 0))
    assert str(reason).startswith("recording failed: ")


# --- on a GPU ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cuda_runners() -> tuple[ModelRunner, ModelRunner]:
    """An eager runner and one with graphs of the same model; float32, as the tolerance says."""
    model = load_model(checkpoint("tiny"), "cuda", "float32")
    eager, replaying = (ModelRunner(model, PLAN, TritonBackend()) for _ in range(2))
    replaying.record_graphs(24, CudaRecorder(model.device))
    return eager, replaying


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_captured_steps_of_every_size_are_those_of_eager_ones(
    cuda_runners: tuple[ModelRunner, ModelRunner],
) -> None:
    """As on the tape, with CUDA's graphs."""
    eager, replaying = cuda_runners
    rng, blocks = np.random.default_rng(5), Blocks(PLAN.sizes, seed=3)
    running = [*texts(6), *requests("one", "adjacent", "three", "late", "apart")]
    for request in running:
        batch = schedule(request, len(request.token_ids), blocks)
        for runner in (eager, replaying):
            runner.compute_logits(batch)
        request.token_ids.append(int(rng.integers(1, 700)))
    for count in (11, 5, 9, 2, 7, 10, 3, 1):
        for among in (len(running), 6):
            chosen = [running[i] for i in rng.permutation(among)[:count]]
            batch = join([schedule(request, 1, blocks) for request in chosen])
            expected = eager.compute_logits(batch)
            actual = replaying.compute_logits(batch)
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
            for request in chosen:
                request.token_ids.append(int(rng.integers(1, 700)))
    assert replaying._graphs is not None
    assert replaying._graphs.num_replays == 16
