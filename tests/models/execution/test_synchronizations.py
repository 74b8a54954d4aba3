"""How often a decode step waits for its device: once, for its tokens.

On a CPU whatever would wait is counted (support/waits.py), on a GPU torch itself tells.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from support.oracle import (
    BLOCK_SIZE,
    Blocks,
    checkpoint,
    join,
    loaded,
    requests,
    schedule,
)
from support.sampled import context_of
from support.waits import counted

from vlmserve.models import device_copies
from vlmserve.models.attention.triton_paged import TritonBackend
from vlmserve.models.batch import PoolSizes, SamplingParams, StepBatch
from vlmserve.models.device_copies import Stopwatch, fetch, upload
from vlmserve.models.execution.graphs.recorder import CudaRecorder
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.kv_cache.pool_sizes import PoolPlan
from vlmserve.models.kv_cache.step_inputs import image_slots
from vlmserve.models.kv_cache.step_tensors import send
from vlmserve.models.sampling import sampler
from vlmserve.models.weights.loader import load_model

PLAN = PoolPlan(PoolSizes(200, 40, BLOCK_SIZE), 800)
GREEDY = SamplingParams(temperature=0.0)
STEPS: dict[str, list[SamplingParams]] = {
    "greedy": [GREEDY] * 7,
    "temperature": [SamplingParams(seed=row) for row in range(7)],
    "top_p and top_k": [SamplingParams(top_p=0.9, top_k=40, seed=row) for row in range(7)],
    "a mixture": [
        GREEDY,
        SamplingParams(temperature=0.7, seed=1),
        SamplingParams(top_p=0.5, seed=2),
        SamplingParams(top_k=3, seed=3),
        SamplingParams(min_p=0.1, top_p=0.6, seed=4),
        SamplingParams(repetition_penalty=1.2, frequency_penalty=0.5, logit_bias=((5, 2.0),)),
        SamplingParams(temperature=0.0, num_logprobs=5, presence_penalty=1.0),
    ],
    "no rivals told": [SamplingParams(seed=row, num_logprobs=0) for row in range(7)],
}


def decode_batch(runner: ModelRunner, params: list[SamplingParams]) -> StepBatch:
    """A token of each of seven sequences, with and without images, whose prompts are computed."""
    running, blocks = requests(), Blocks(PLAN.sizes)
    for request in running:
        runner.compute_logits(schedule(request, len(request.token_ids), blocks))
        request.token_ids.append(7)
    batch = join([schedule(request, 1, blocks) for request in running])
    for sequence, one in zip(batch.sequences, params, strict=True):
        sequence.sampling = one
        if one.has_penalties:
            sequence.context = context_of([1, 2, 3], [4, 4, 5], [6])
    return batch


@pytest.mark.parametrize("name", STEPS)
def test_a_decode_step_waits_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = ModelRunner(loaded("tiny"), PLAN)
    monkeypatch.setattr(sampler, "WINDOW", 600)  # of 768: with all, no cut is undecided
    batch = decode_batch(runner, STEPS[name])
    with counted(monkeypatch, loaded("tiny").model) as waits:
        result = runner.execute(batch)
    assert not waits.others, dict(waits.others)
    assert waits.num_fetches == 1
    assert waits.num_uploads > 0
    assert len(result.token_ids) == 7


def image_batch() -> StepBatch:
    """Whole prompts, with and without images."""
    blocks = Blocks(PLAN.sizes)
    return join([schedule(one, len(one.token_ids), blocks) for one in requests()])


def test_a_step_with_images_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waited for the whole device, to measure the seconds, and for each upload of an image."""
    runner, batch = ModelRunner(loaded("tiny"), PLAN), image_batch()
    assert len(batch.images) > 4  # more than a pass
    uploads: list[tuple[str, int]] = []
    to_device = device_copies._to_device
    monkeypatch.setattr(
        device_copies,
        "_to_device",
        lambda host, device: (
            uploads.append((str(host.dtype), host.numel())) or to_device(host, device)
        ),
    )
    with counted(monkeypatch, loaded("tiny").model) as waits:
        result = runner.execute(batch)
    assert not waits.others, dict(waits.others)
    assert waits.num_fetches == 1
    assert result.vision_seconds > 0
    pixels = [size for dtype, size in uploads if dtype == "torch.uint8"]
    assert pixels == [len(one.image.data) for one in batch.images]


@pytest.mark.parametrize("has_images", [False, True], ids=["decodes", "images"])
def test_the_inputs_of_a_step_reach_a_device_in_one_copy(
    has_images: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row mask, image slots and sampled places were copied by themselves, as was each plan."""
    runner = ModelRunner(loaded("tiny"), PLAN)
    batch = image_batch() if has_images else decode_batch(runner, STEPS["greedy"])
    batch.sequences[0].sampling = None  # so that the sampled places are not all
    inputs = runner._pack(batch)
    slots = image_slots(batch.finished_images, loaded("tiny").num_patches) if has_images else None
    copied: list[str] = []
    monkeypatch.setattr(
        device_copies, "_to_device", lambda host, device: copied.append(device.type) or host
    )
    sent = [
        send(inputs, slots, TritonBackend(), torch.device(name), torch.float32)
        for name in ("cpu", "meta")
    ]
    on_cpu, moved = sent
    assert copied.count("meta") == 1
    for name in ("token_ids", "positions", "row_mask", "sampled"):
        assert torch.equal(getattr(moved, name), getattr(on_cpu, name)), name
    assert torch.equal(moved.step.text_slots, on_cpu.step.text_slots)
    assert torch.equal(moved.step.cross_plan.key_lens, on_cpu.step.cross_plan.key_lens)
    if has_images:
        assert torch.equal(moved.step.image_slots, on_cpu.step.image_slots)


class FakeEvent:
    """A CUDA event on a stream that is done when the test says so."""

    is_done = False
    count = 0

    def __init__(self, enable_timing: bool) -> None:
        FakeEvent.count += 1
        self._number = FakeEvent.count

    def record(self, stream: object) -> None:
        assert stream == "the stream"

    def query(self) -> bool:
        return FakeEvent.is_done

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end._number - self._number)


def test_the_seconds_of_images_are_read_when_the_device_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a wait: a step without tokens leaves them to the next step."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the stream")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: pytest.fail("it waited"))
    runner = ModelRunner(loaded("tiny"), PLAN)
    monkeypatch.setattr(runner._vision, "start_watch", lambda: Stopwatch(torch.device("cuda", 0)))
    batch = image_batch()
    assert runner.execute(batch).vision_seconds == 0
    monkeypatch.setattr(FakeEvent, "is_done", True)
    assert runner.execute(batch).vision_seconds == 2 * 1.0
    assert runner.execute(StepBatch(batch.sequences)).vision_seconds == 0


def test_a_cut_beyond_the_window_waits_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = ModelRunner(loaded("tiny"), PLAN)
    monkeypatch.setattr(sampler, "WINDOW", 600)
    flat = SamplingParams(temperature=2.0, top_p=0.99999, seed=1, num_logprobs=2)
    batch = decode_batch(runner, [flat] * 7)
    with counted(monkeypatch, loaded("tiny").model) as waits:
        result = runner.execute(batch)
    assert not waits.others, dict(waits.others)
    assert waits.num_fetches == 2
    assert all(0 <= one < 768 for one in result.token_ids.values())
    assert all(one.logprob > -9999.0 for one in result.logprobs.values())


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.tolist(),
        lambda x: bool((x > 0).all()),
        lambda x: float(x.sum()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: torch.from_numpy(np.ones(3)).to(x.device),
        lambda x: torch.masked_select(x, x > 0),
    ],
)
def test_what_would_wait_is_counted(wait, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above rest on."""
    with counted(monkeypatch) as waits:
        wait(torch.ones(3))
    assert sum(waits.others.values()) > 0


def test_values_come_up_and_down_as_they_are() -> None:
    device = torch.device("cpu")
    values = [np.arange(5), np.float32([[1.5, -2.0]]), np.int64([]), np.float32([0.25])]
    tensors = [upload(one, device) for one in values]
    for expected, actual in zip(values, fetch(tensors), strict=True):
        assert actual.dtype == expected.dtype
        assert np.array_equal(actual, expected)
    assert upload([1, 2], device, np.float64).dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("name", [*STEPS, "images"])
@pytest.mark.parametrize("has_graphs", [False, True], ids=["eager", "graphs"])
def test_a_step_on_a_gpu_waits_for_nothing_but_its_tokens(has_graphs: bool, name: str) -> None:
    """torch warns at each wait that it knows of, but not at that for the event behind the tokens.

    The first step compiles and is not counted.
    """
    model = load_model(checkpoint("tiny"), "cuda", "float32")
    runner = ModelRunner(model, PLAN, TritonBackend())
    if has_graphs:
        runner.record_graphs(8, CudaRecorder(model.device))
    batch = image_batch() if name == "images" else decode_batch(runner, STEPS[name])
    runner.execute(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            runner.execute(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [one for one in seen if "synchroniz" in str(one.message)]
    assert not waits, [str(one.message) for one in waits]
