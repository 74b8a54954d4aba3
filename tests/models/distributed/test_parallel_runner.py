"""Tensor parallelism: the plan, a cut model against the whole one, and ranks in their processes.

In most tests the ranks are threads of this process whose collectives meet at a barrier; the last
ones start real processes over gloo.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections import defaultdict
from pathlib import Path

import numpy
import openai
import pytest
import torch
from support.adapters import MIXED
from support.coded_checkpoints import FORMS, Form, compressed, pack, write
from support.oracle import (
    BLOCK_SIZE,
    checkpoint,
    generate,
    oracle,
    oracle_logits,
    prefill_logits,
    requests,
)
from support.polling import wait_until
from support.running import MODEL_NAME, serving
from support.thread_ranks import ThreadGroup, on_ranks
from torch import Tensor
from torch.distributed import distributed_c10d

from vlmserve.models.batch import (
    BlockCopy,
    CrossSegment,
    PoolSizes,
    ScheduledSequence,
    StepBatch,
    never,
)
from vlmserve.models.bundled.pictures import data_url, draw, random_scene
from vlmserve.models.create_runner import create_runner
from vlmserve.models.decoder.decoder import is_fused
from vlmserve.models.distributed import parallel_runner, ranks, wire
from vlmserve.models.distributed.parallel_runner import ParallelRunner, create_parallel_runner
from vlmserve.models.distributed.ranks import Ranks
from vlmserve.models.distributed.wire import RankSettings
from vlmserve.models.errors import ModelError, StepError, StepTooLargeError
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.kv_cache.pool_sizes import PoolPlan
from vlmserve.models.memory import sizing
from vlmserve.models.memory.available import AvailableMemory
from vlmserve.models.settings.runner_config import RunnerConfig
from vlmserve.models.tensor_parallel.group import DistributedGroup
from vlmserve.models.tensor_parallel.plan import Side, check_size, cut_linears, narrow, rank_slice
from vlmserve.models.weights.loader import LoadedModel, load_model, open_checkpoint

SIZES = PoolSizes(200, 40, BLOCK_SIZE)


def rank_part(layout: str, group: ThreadGroup | None, quantize: str | None = None) -> LoadedModel:
    """A rank's part of a checkpoint in float32, or the whole."""
    return load_model(checkpoint(layout), "cpu", "float32", quantize, group)


def meta_model(layout: str = "tiny"):
    return open_checkpoint(checkpoint(layout), torch.float32).meta_model


def test_every_decoder_layer_is_cut_and_nothing_else_but_vision_and_head() -> None:
    model = meta_model()
    cut = cut_linears(model, 2)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "model.multi_modal_projector":
            assert name in cut, name
    ins = {name.rpartition(".")[2] for name, side in cut.items() if side is Side.IN}
    assert ins == {"o_proj", "down_proj", "fc2"}


def test_a_vision_encoder_that_does_not_divide_stays_whole() -> None:
    model = meta_model()
    model.config.vision_config.attention_heads = 3
    cut = cut_linears(model, 2)
    assert not any(name.startswith("model.vision_model") for name in cut)
    assert any(name.startswith("model.language_model") for name in cut)


def test_a_vocabulary_that_does_not_divide_stays_whole() -> None:
    model = meta_model()
    model.lm_head = torch.nn.Linear(8, 767, device="meta")
    assert "lm_head" not in cut_linears(model, 2)


def test_a_number_of_ranks_that_does_not_divide_is_refused_with_those_that_do() -> None:
    config = meta_model().config
    config.text_config.num_attention_heads = 32
    config.text_config.num_key_value_heads = 8
    config.text_config.intermediate_size = 14336
    check_size(config, 8)
    with pytest.raises(
        ModelError,
        match=r"32 attention heads do not divide by 3 ranks: --tensor-parallel-size can be "
        "1, 2, 4, 8$",
    ):
        check_size(config, 3)


def test_shares_cover_a_side_once() -> None:
    assert [rank_slice(12, rank, 3) for rank in range(3)] == [
        slice(0, 4),
        slice(4, 8),
        slice(8, 12),
    ]


def test_a_module_with_weights_is_not_cut() -> None:
    model = load_model(checkpoint("tiny"), "cpu", "float32").model
    with pytest.raises(AssertionError, match="must not have weights yet"):
        narrow(model, {"model.multi_modal_projector": Side.OUT}, 2)


def logits_of_two_ranks(layout: str, quantize: str | None = None) -> dict[str, Tensor]:
    """Of every prompt at every position, in chunks, batched; the ranks have the same bits."""

    def compute(group):
        model = rank_part(layout, group, quantize)
        assert is_fused(model.model.model.language_model)
        return prefill_logits(ModelRunner(model, PoolPlan(SIZES, 800)), requests(), chunk=5)

    first, second = on_ranks(2, compute)
    assert all(torch.equal(first[name], second[name]) for name in first)
    return first


@pytest.mark.parametrize("layout", ["tiny", "all-kv-heads"])
def test_two_ranks_give_the_oracles_logits_at_every_position(layout) -> None:
    """float32, 1e-4."""
    logits = logits_of_two_ranks(layout)
    for request in requests():
        expected = oracle_logits(layout, request)
        torch.testing.assert_close(logits[request.request_id], expected, atol=1e-4, rtol=1e-4)


def test_two_ranks_with_int8_weights_are_as_near_as_one() -> None:
    """Each rank scales its own part of a channel, so the bits are not those of one rank."""
    logits = logits_of_two_ranks("tiny", "int8")
    for request in requests():
        exact = oracle_logits("tiny", request)
        error = (logits[request.request_id] - exact).square().mean() / exact.square().mean()
        assert 0 < error.sqrt() < 0.05


# groups that the inputs of both ranks are made of, and groups and orders that cannot be cut
SHARED = ("fp8-channel", "w4a16-channel", "w8a8", "w4a16-groups-of-16")
UNSHARED = {
    "nf4-dynamic": "96 inputs in groups of 32 do not divide by 2",
    "gptq-act-order": r"another order \(act-order\); use a smaller --tensor-parallel-size",
}
GROUPS_OF_16 = Form(pack(4, symmetric=False, group=16), compressed("pack-quantized"))


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(form, marks=pytest.mark.slow) if form in ("w4a16-channel", "w8a8") else form
        for form in (*SHARED, *UNSHARED)
    ],
)
def test_two_ranks_share_a_quantized_checkpoint_exactly(form, tmp_path) -> None:
    """Its scales are the files', so the logits are those of the dequantized weights."""
    coded, dequantized = write(Path(checkpoint("tiny")), FORMS.get(form, GROUPS_OF_16), tmp_path)

    def compute(group=None, folder=coded):
        model = load_model(folder, "cpu", "float32", group=group)
        return prefill_logits(ModelRunner(model, PoolPlan(SIZES, 800)), requests(), chunk=5)

    expected = compute(folder=dequantized)
    if form in UNSHARED:
        with pytest.raises(ModelError, match=f"split over 2 ranks: .*{UNSHARED[form]}"):
            on_ranks(2, compute)
        return
    first, second = on_ranks(2, compute)
    for name, logits in expected.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], logits, atol=1e-4, rtol=1e-4)


def test_a_rank_holds_half_of_the_cut_weights_and_half_of_the_cache() -> None:
    def compute(group=None):
        model = rank_part("tiny", group)
        runner = ModelRunner(model, PoolPlan(SIZES, 800))
        layer = model.model.model.language_model.layers[0]
        weights = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
        return weights, runner.pools.layers[0].keys.numel(), model.geometry

    whole, keys, geometry = compute()
    for part in on_ranks(2, compute):
        assert part[:2] == (whole // 2, keys // 2)
        assert part[2].num_heads * 2 == geometry.num_heads
        assert part[2].num_kv_heads * 2 == geometry.num_kv_heads


def test_ranks_size_their_pools_together_by_the_one_with_the_least_room(monkeypatch) -> None:
    """A step that is measured has collectives in it, so that each must measure as often as all.

    Once each halved the longest sequence by its own room, and one measured on while the other
    waited for its answer.
    """
    measured: dict[int, list[int]] = defaultdict(list)

    measured_peaks = sizing.peaks_by_device

    def peaks(model, attention, limits, with_graphs):
        measured[threading.get_ident()].append(limits.max_model_len)
        return measured_peaks(model, attention, limits, with_graphs)

    monkeypatch.setattr(sizing, "peaks_by_device", peaks)
    options = OPTIONS | {"num_text_blocks": None, "num_image_blocks": None, "max_num_seqs": 8}
    limits = {"max_num_batched_tokens": 64, "max_num_batched_images": 1}

    def size(group: ThreadGroup):
        room = AvailableMemory((16, 512)[group.rank] << 20, "as a test says")
        config = RunnerConfig(**(options | limits))
        info = create_runner(
            checkpoint("tiny"), config, available=lambda device: room, group=group
        ).info
        # what a process holds differs from one moment to the next
        return dataclasses.replace(info, max_memory_bytes=0)

    first, second = on_ranks(2, size)
    assert first == second
    lens = list(measured.values())
    assert lens[0] == lens[1]
    assert len(lens[0]) > 1


def test_a_step_that_is_too_large_for_a_rank_is_not_tried_again_shorter(monkeypatch) -> None:
    """The other ranks are in the middle of it."""

    def peaks(model, attention, limits, with_graphs):
        raise StepTooLargeError("a step does not fit beside the weights")

    monkeypatch.setattr(sizing, "peaks_by_device", peaks)
    with pytest.raises(StepTooLargeError):
        on_ranks(
            1, lambda group: create_runner(checkpoint("tiny"), RunnerConfig(**OPTIONS), group=group)
        )


@pytest.mark.parametrize("quantize", ["bitsandbytes", "bitsandbytes-nf4"])
def test_what_does_not_go_with_ranks_is_refused_with_the_remedy(quantize) -> None:
    def compute(group):
        rank_part("tiny", group, quantize)

    with pytest.raises(ModelError, match=r"with --tensor-parallel-size use --quantize int8"):
        on_ranks(2, compute)


def test_a_step_is_told_without_its_grammars() -> None:
    """All else is told; once the freed blocks of the debug mode were lost."""
    batch = StepBatch(
        [ScheduledSequence("a", [1], 0, [0], [CrossSegment(1, [])], matcher=object())],
        copies=[BlockCopy(1, 2)],
        freed_text_blocks=[3],
        freed_image_blocks=[4],
    )
    told = wire.step_decoder.decode(wire.frame_of(wire.RankStep(batch))[4:]).batch
    # an empty sequence of any kind is read as a list
    without = [dataclasses.replace(batch.sequences[0], matcher=None, draft_contexts=[])]
    assert told == dataclasses.replace(batch, sequences=without)
    assert batch.sequences[0].matcher is not None


class FailingRunner:
    adapters = None

    def __init__(self, error: Exception) -> None:
        self.error = error

    def execute(self, batch, on_launch):
        raise self.error


class NoRanks:
    def compute(self, batch) -> None:
        pass


def test_a_step_that_is_refused_goes_on_and_one_that_fails_ends_the_process() -> None:
    deaths: list[str] = []
    refused = ParallelRunner(FailingRunner(StepError("no")), NoRanks(), deaths.append)
    with pytest.raises(StepError, match="no"):
        refused.execute(StepBatch())
    assert deaths == []
    failed = ParallelRunner(FailingRunner(MemoryError()), NoRanks(), deaths.append)
    with pytest.raises(StepError, match="one rank only"):
        failed.execute(StepBatch())
    assert deaths == ["the ranks are out of step"]


def test_a_rank_starts_no_pass_that_the_others_do_not_have() -> None:
    """It would wait in its first sum for ranks that have no step."""

    class Local(FailingRunner):
        def prepare(self, rows: object, may_start: object = never) -> None:
            self.may_start = may_start

    local = Local(StepError("no"))
    ParallelRunner(local, NoRanks(), lambda reason: None).prepare([], lambda: True)
    assert local.may_start is never


def test_after_loading_a_collective_waits_two_minutes(tmp_path: Path) -> None:
    """A rank whose GPU hangs would hold the others for the hour that loading may take."""
    group = DistributedGroup(0, 1, torch.device("cpu"), tmp_path / "meeting")
    try:

        def timeout_s() -> float:
            backend = distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
            return backend.options._timeout.total_seconds()

        assert timeout_s() == 3600
        group.has_loaded()
        assert timeout_s() == 120
    finally:
        group.close()


# Ranks in processes of their own


OPTIONS = {
    "device": "cpu",
    "dtype": "float32",
    "num_text_blocks": 200,
    "num_image_blocks": 40,
    "block_size": BLOCK_SIZE,
    "max_num_seqs": 4,
    "num_threads": 1,
}


def meeting_places() -> list[str]:
    """This process's open files by which ranks meet."""
    files = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return [str(file) for file in files if file.is_symlink() and "ranks" in os.readlink(file)]


@pytest.mark.slow
def test_ranks_in_processes_of_their_own_give_the_tokens_of_one(tmp_path: Path) -> None:
    """Over gloo, prompts with pictures and without, with adapters, batched; a rank is killed."""
    whole, shared = requests("text", "one", "adjacent"), requests("text", "one", "adjacent")
    model, config = checkpoint("tiny"), RunnerConfig(**OPTIONS, max_loras=2, max_lora_rank=8)
    adapters = [MIXED[name].write(tmp_path / name, oracle("tiny")) for name in ("all", "vision")]
    for request, ref in zip([*whole[1:], *shared[1:]], adapters * 2, strict=True):
        request.adapter = ref.digest
    alone = create_runner(model, config)
    deaths: list[str] = []
    runner = create_parallel_runner(model, 2, config, deaths.append)
    try:
        for one in (alone, runner):
            infos = [one.adapters.read(ref) for ref in adapters]
            assert [info.changes_text for info in infos] == [True, False]
        runner.adapters.forget(adapters[1].digest)
        runner.adapters.read(adapters[1])
        generate(alone, whole, num_tokens=6, chunk=7)
        generate(runner, shared, num_tokens=6, chunk=7)
        assert [r.generated for r in shared] == [r.generated for r in whole]
        # once it was not told, and the engine's first heartbeat within a step was its last
        assert runner.num_layers_started > 0
        # NCCL asks there as long as the group lives; once it was deleted when all had met
        assert meeting_places()
        (pid,) = runner.rank_pids
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: deaths)
        assert deaths[0] == "rank 1 died (signal 9)"
    finally:
        runner.close()
    assert not meeting_places()


def rank_settings(folder: Path, **options) -> RankSettings:
    """The first of two ranks of the small model."""
    config = RunnerConfig(**OPTIONS | options)
    place = str(folder / "meeting")
    return RankSettings(
        rank=0, size=2, meeting_place=place, model=checkpoint("tiny"), config=config
    )


@pytest.mark.slow
def test_a_rank_that_ends_while_it_loads_is_named(tmp_path: Path) -> None:
    """Its options name a device that there is not, which it tells before it goes."""
    deaths: list[str] = []
    ranks = Ranks(rank_settings(tmp_path, device="tpu"), deaths.append)
    try:
        with pytest.raises(ModelError, match=r"^rank 1: device 'tpu' is unknown"):
            ranks.wait_ready()
    finally:
        ranks.close()
    assert deaths == []


@pytest.mark.slow
def test_a_first_rank_that_fails_while_others_wait_for_it_says_so(monkeypatch) -> None:
    """It waited for their word, as they did for it, for an hour."""

    def fail(settings):
        raise RuntimeError("the driver is too old")

    monkeypatch.setattr(parallel_runner, "join_group", fail)
    monkeypatch.setattr(ranks, "REPORT_TIMEOUT_S", 0.1)
    with pytest.raises(RuntimeError, match="the driver is too old"):
        create_parallel_runner(checkpoint("tiny"), 2, RunnerConfig(**OPTIONS))
    assert not meeting_places()


@pytest.mark.slow
def test_ranks_end_when_the_first_one_goes_away(tmp_path: Path) -> None:
    """Also in the middle of waiting for the others: here the first rank never comes."""
    ranks = Ranks(rank_settings(tmp_path), lambda line: None)
    (pid,) = ranks.pids
    ranks.close()
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [(), ("--quantize", "int8")], ids=["whole", "int8"])
def test_a_server_over_two_ranks_sees_what_is_drawn(tmp_path: Path, quantize) -> None:
    scene = random_scene(numpy.random.default_rng(5), 2)
    options = ("--tensor-parallel-size", "2", "--dtype", "float32", *quantize)
    with (
        serving(tmp_path, *options) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client,
    ):
        picture = {"type": "image_url", "image_url": {"url": data_url(draw(scene))}}
        text = {"type": "text", "text": "How many shapes are there?"}
        answer = client.chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": [picture, text]}],
            temperature=0,
        )
    assert answer.choices[0].message.content == "There are two shapes."
