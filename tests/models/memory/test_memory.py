"""What a device has free, what a step and the weights take, and how the pools share the rest."""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.oracle import checkpoint, generate, loaded, prompt
from torch.profiler import ProfilerActivity, profile
from triton.runtime.errors import PTXASError

from vlmserve.bench.checkpoints import build, layout
from vlmserve.models.attention.choice import choose_backend
from vlmserve.models.batch import INSERTED_PART, PoolSizes
from vlmserve.models.create_runner import create_runner
from vlmserve.models.decoder.decoder import LayerCount
from vlmserve.models.decoder.int8.linear import Int8Linear
from vlmserve.models.errors import ModelError
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.kernels import c_library
from vlmserve.models.kernels.float32_products import widens
from vlmserve.models.kv_cache.pool_sizes import PoolRequest, plan_over_devices
from vlmserve.models.memory import peak_step, sizing
from vlmserve.models.memory.available import AvailableMemory, available_cpu_memory, available_memory
from vlmserve.models.memory.estimate import by_kind, part_bytes, peak_bytes
from vlmserve.models.memory.fit import needs_of, needs_on, plan_of
from vlmserve.models.memory.peak_step import StepLimits, measure_peak, peak_batch, probe_plan
from vlmserve.models.memory.sizing import MemoryReadings, size_pools
from vlmserve.models.settings.runner_config import RunnerConfig
from vlmserve.models.weights.device_map import on_one_device, parts_of
from vlmserve.models.weights.loader import LoadedModel, load, load_model, open_checkpoint
from vlmserve.models.weights.random_weights import random_checkpoint
from vlmserve.models.weights.tensor_loader import WHOLE

CPU = torch.device("cpu")
MIB, GIB = 1 << 20, 1 << 30


# --- what is free ------------------------------------------------------------------------------


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 64000000 kB\nMemFree: 1 kB\nMemAvailable: 8388608 kB"}
STAT = "anon 1\ninactive_file 100\nactive_file 200\nfile 400\ntotal_inactive_file 1000"
GROUP_2 = "sys/fs/cgroup"
GROUP_1 = "sys/fs/cgroup/memory"

MACHINES: dict[str, tuple[dict[str, object], int]] = {
    "no control group": ({}, 8 * GIB),
    "a group without a limit": (
        {"proc/self/cgroup": "0::/app", f"{GROUP_2}/app/memory.max": "max"},
        8 * GIB,
    ),
    "version 2, in a container": (
        {
            "proc/self/cgroup": "0::/",
            f"{GROUP_2}/memory.max": 2 * GIB,
            f"{GROUP_2}/memory.current": GIB,
            f"{GROUP_2}/memory.stat": STAT,
        },
        GIB + 300,
    ),
    "version 2, a limit above the process's own group": (
        {
            "proc/self/cgroup": "0::/pod/app",
            f"{GROUP_2}/pod/memory.max": 3 * GIB,
            f"{GROUP_2}/pod/memory.current": GIB,
            f"{GROUP_2}/pod/app/memory.max": 4 * GIB,
            f"{GROUP_2}/pod/app/memory.current": GIB // 2,
        },
        2 * GIB,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/app\n4:memory:/app\n0::/app",
            f"{GROUP_1}/app/memory.limit_in_bytes": 2 * GIB,
            f"{GROUP_1}/app/memory.usage_in_bytes": GIB,
            f"{GROUP_1}/app/memory.stat": STAT,
            f"{GROUP_1}/memory.limit_in_bytes": 9223372036854771712,
        },
        GIB + 1000,
    ),
    "version 1, in a container that sees its host's path": (
        {
            "proc/self/cgroup": "4:memory:/docker/0123",
            f"{GROUP_1}/memory.limit_in_bytes": 2 * GIB,
            f"{GROUP_1}/memory.usage_in_bytes": 0,
        },
        2 * GIB,
    ),
    "a limit above what the machine has": (
        {"proc/self/cgroup": "0::/", f"{GROUP_2}/memory.max": 100 * GIB},
        8 * GIB,
    ),
    "a group over its limit": (
        {
            "proc/self/cgroup": "0::/",
            f"{GROUP_2}/memory.max": GIB,
            f"{GROUP_2}/memory.current": 2 * GIB,
        },
        0,
    ),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_room_of_a_cpu_is_what_machine_and_control_groups_leave(
    machine: str, tmp_path: Path
) -> None:
    files, expected = MACHINES[machine]
    assert available_cpu_memory(write(tmp_path, MEMINFO | files)).num_bytes == expected


def test_a_limit_of_a_control_group_is_named(tmp_path: Path) -> None:
    files, _ = MACHINES["version 2, in a container"]
    source = available_cpu_memory(write(tmp_path, MEMINFO | files)).source
    assert source == "the 1.0 GiB that a limit of 2.0 GiB leaves"


def test_this_machine_has_memory_by_its_own_account() -> None:
    assert MIB < available_memory(CPU, 0.9).num_bytes < available_cpu_memory().num_bytes


def test_the_room_of_a_gpu_counts_what_others_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (14 * GIB, 20 * GIB))
    gpu = torch.device("cuda", 0)
    assert available_memory(gpu, 0.9) == AvailableMemory(
        12 * GIB, "90% of 20.0 GiB less 6.0 GiB in use"
    )
    assert available_memory(gpu, 0.2).num_bytes == 0


# --- weights -----------------------------------------------------------------------------------


def held_bytes(model: LoadedModel) -> int:
    """Bytes of all weights as they are held, quantized ones' scales included."""
    total = 0
    for module in model.model.modules():
        for weight in module.parameters(recurse=False):
            total += weight.nbytes
            state: Any = getattr(weight, "quant_state", None)
            total += 0 if state is None else state.absmax.nbytes
            scales = getattr(weight, "SCB", None)
            total += 0 if scales is None else scales.nbytes
        if isinstance(module, Int8Linear):
            total += module.codes.nbytes + module.scales.nbytes
    return total


@pytest.mark.parametrize("method", [None, "int8", "bitsandbytes", "bitsandbytes-nf4"])
def test_weights_take_what_their_headers_promise(method: str | None) -> None:
    opened = open_checkpoint(checkpoint("tiny"), torch.float32)
    sizes = part_bytes(parts_of(opened.meta_model), opened.tensors, torch.float32, method)
    model = load(opened, on_one_device(opened.meta_model, CPU), method)
    assert sum(sizes.values()) == held_bytes(model)
    assert sum(by_kind(sizes).values()) == sum(sizes.values())


def test_a_narrower_type_takes_half() -> None:
    opened = open_checkpoint(checkpoint("tiny"), torch.bfloat16)
    parts = parts_of(opened.meta_model)
    whole = part_bytes(parts, opened.tensors, torch.float32)
    half = part_bytes(parts, opened.tensors, torch.bfloat16)
    assert {part: 2 * size for part, size in half.items()} == whole


# --- a step's peak -----------------------------------------------------------------------------


@functools.cache
def model_of(layout: str, dtype: str, has_c: bool = True) -> LoadedModel:
    """has_c: with this project's C, where a compiler is installed."""
    folder = build(layout, tempfile.mkdtemp(prefix="vlmserve-"), with_processor=False)
    with c_library.allowed(has_c):
        return load_model(folder, "cpu", dtype)


def measured_bytes(model: LoadedModel, limits: StepLimits, *, is_inside: bool = False) -> int:
    """The most that torch held at once in the costliest step, by its own account.

    is_inside: the costliest step that may be inserted is computed before each of its layers.
    """
    runner = ModelRunner(model, probe_plan(4, 16, limits.max_model_len))
    batch = peak_batch(runner.info, limits)
    num_inserted = limits.max_num_batched_tokens // INSERTED_PART
    if is_inside and num_inserted:
        inserted = peak_batch(
            runner.info,
            replace(
                limits,
                max_num_seqs=1,
                max_num_batched_tokens=num_inserted,
                max_num_batched_images=0,
            ),
        )
        inserted.sequences[0].prompt = None
        assert runner.call_between_layers(lambda: runner.execute(inserted))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        runner.execute(batch)
    kineto: Any = profiler.profiler
    events = [one for one in kineto.kineto_results.events() if one.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


# max_num_seqs, max_num_batched_tokens, max_num_batched_images, max_model_len: each phase's turn
STEPS = {
    "one picture": StepLimits(1, 64, 1, 64),
    "pictures of two passes": StepLimits(1, 64, 8, 64),
    "many rows that see a picture": StepLimits(64, 64, 1, 64),
    "a whole prompt": StepLimits(1, 2048, 1, 2048),
    "a chunk behind a long past": StepLimits(1, 1024, 1, 8192),
    "chunk, rows and pictures": StepLimits(32, 1024, 4, 2048),
    "many long rows": StepLimits(64, 64, 1, 4096),
}


# Each phase has its turn on the tiny model in every run, and one on each of the others.
MODELS = [("tiny", "float32"), ("m100", "bfloat16"), ("vision-heavy", "bfloat16")]


@pytest.mark.parametrize(
    ("layout", "dtype", "step"),
    [
        pytest.param(
            *model,
            step,
            marks=() if model[0] == "tiny" else pytest.mark.slow,
        )
        for model in MODELS
        for step in STEPS
    ],
)
def test_the_computed_peak_is_no_less_than_the_measured_one_and_not_twice_it(
    layout: str, dtype: str, step: str
) -> None:
    """Of torch's products, which need more than the C; which of them is used is not known yet."""
    model, limits = model_of(layout, dtype, has_c=False), STEPS[step]
    is_widened = widens(model.dtype, CPU)
    computed = peak_bytes(model.model.config, limits, model.dtype, is_widened=is_widened).most
    measured = measured_bytes(model, limits)
    assert measured <= computed <= 2 * measured, (computed / MIB, measured / MIB)
    assert (by_c := measured_bytes(model_of(layout, dtype), limits)) <= computed, by_c / MIB


@pytest.mark.parametrize("step", STEPS)
def test_a_step_with_another_inside_takes_no_more_than_the_computed_peak(step: str) -> None:
    model, limits = model_of("tiny", "float32"), STEPS[step]
    computed = peak_bytes(model.model.config, limits, model.dtype, has_inserted=True).most
    measured = measured_bytes(model, limits, is_inside=True)
    assert measured <= computed, (measured / MIB, computed / MIB)


def test_the_costliest_step_is_within_its_limits() -> None:
    runner = ModelRunner(loaded("tiny"), probe_plan(4, 16, 4096))
    batch = peak_batch(runner.info, StepLimits(8, 100, 3, 4096))
    assert len(batch.sequences) == 8
    assert sum(len(one.token_ids) for one in batch.sequences) == 100
    assert [one.image.num_tiles for one in batch.images] == [4, 4, 4]
    assert {one.start + len(one.token_ids) for one in batch.sequences} == {4096}


class FakeStats:
    """torch's memory statistics of a GPU that is not there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        reserved = {"memory_reserved": 7 * GIB, "max_memory_reserved": 9 * GIB}
        for name, value in reserved.items():
            monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)


def as_if_on_gpu(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """The model, which says of its placement that a GPU is among its devices."""
    FakeStats(monkeypatch)
    devices = [CPU, torch.device("cuda", 0)]
    monkeypatch.setattr(type(model.placement), "devices", lambda self: devices)
    return model


def test_a_gpus_peak_is_what_the_costliest_step_reserves(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    execute = ModelRunner.execute

    def counted(self: ModelRunner, batch: Any) -> Any:
        ran.append(sum(len(one.token_ids) for one in batch.sequences))
        return execute(self, batch)

    monkeypatch.setattr(ModelRunner, "execute", counted)
    model = as_if_on_gpu(loaded("tiny"), monkeypatch)
    choice = choose_backend("sdpa", model.geometry)
    peaks = measure_peak(model, choice, StepLimits(4, 32, 1, 256))
    assert peaks == {torch.device("cuda", 0): 2 * GIB}
    assert ran == [32]


def test_the_memory_of_recorded_decode_steps_is_added_to_a_gpus_peak(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the device lost while they were recorded, and nothing where that fails."""
    model = as_if_on_gpu(loaded("tiny"), monkeypatch)
    free, recorded = [50 * GIB, 47 * GIB, 47 * GIB, 47 * GIB], []

    def record(self: ModelRunner, max_num_seqs: int, recorder: Any) -> None:
        recorded.append(max_num_seqs)
        if len(recorded) > 1:
            raise errors.pop(0)

    errors = [torch.OutOfMemoryError("CUDA out of memory"), PTXASError("Internal Triton PTX error")]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free.pop(0), 80 * GIB))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(peak_step, "CudaRecorder", lambda device: None)
    monkeypatch.setattr(ModelRunner, "record_graphs", record)
    choice, limits = choose_backend("sdpa", model.geometry), StepLimits(4, 32, 1, 256)
    taken = [measure_peak(model, choice, limits, with_graphs=True) for _ in range(3)]
    assert [list(one.values()) for one in taken] == [[5 * GIB], [2 * GIB], [2 * GIB]]
    assert recorded == [4, 4, 4]


def test_a_peak_that_runs_out_of_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: ModelRunner, batch: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(ModelRunner, "execute", fail)
    model = as_if_on_gpu(loaded("tiny"), monkeypatch)
    choice = choose_backend("sdpa", model.geometry)
    with pytest.raises(ModelError, match="4 sequences does not fit beside the weights") as raised:
        measure_peak(model, choice, StepLimits(4, 32, 1, 256))
    assert "\n" not in str(raised.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_measured_peak_of_a_gpu_is_near_the_computed_one() -> None:
    folder = build("m100", tempfile.mkdtemp(prefix="vlmserve-"), with_processor=False)
    model = load_model(folder, "cuda", "bfloat16")
    limits = StepLimits(64, 2048, 4, 4096)
    measured = measure_peak(model, choose_backend("sdpa", model.geometry), limits)
    computed = peak_bytes(model.model.config, limits, model.dtype).most
    assert measured[model.device] / 2 < computed < 3 * measured[model.device]


# --- the pools ---------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "max_num_batched_images": 1,
    "block_size": 16,
    "num_threads": torch.get_num_threads(),
}


def available(num_bytes: int) -> Callable[[torch.device], AvailableMemory]:
    return lambda device: AvailableMemory(num_bytes, "as a test says")


def weight_bytes() -> int:
    return held_bytes(loaded("tiny"))


@pytest.mark.parametrize("room", [24 * MIB, 48 * MIB, 96 * MIB, 512 * MIB])
def test_pools_take_what_weights_and_the_peak_step_leave(room: int) -> None:
    runner = create_runner(checkpoint("tiny"), RunnerConfig(**SMALL), available=available(room))
    pools = sum(one.keys.nbytes + one.values.nbytes for one in runner.pools.layers)
    limits = StepLimits(8, 64, 1, runner.info.max_model_len)
    peak_size = peak_bytes(runner.config, limits, torch.float32, has_inserted=True).most
    assert pools + peak_size + weight_bytes() <= room
    # and what they leave is little, or they hold all that eight sequences can use
    sizes = runner.info.pools
    is_full = sizes.num_text_blocks == 8 * -(-runner.info.max_model_len // 16)
    assert is_full or pools + peak_size + weight_bytes() > room / 3


def test_max_memory_bounds_the_pools_too() -> None:
    sizes = [
        create_runner(
            checkpoint("tiny"), RunnerConfig(**SMALL, **limit), available=available(room)
        ).info.pools
        for limit, room in (({"max_memory": {"cpu": 24 * MIB}}, 512 * MIB), ({}, 24 * MIB))
    ]
    assert sizes[0] == sizes[1]


def test_a_context_over_which_a_step_runs_out_of_memory_shrinks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU the measured step itself may run out of memory at the model's full context."""
    lens: list[int] = []

    def peaks(
        loaded: Any, attention: Any, limits: StepLimits, with_graphs: bool
    ) -> dict[torch.device, int]:
        lens.append(limits.max_model_len)
        if limits.max_model_len > 5000:
            raise ModelError("a step does not fit beside the weights")
        return {CPU: MIB}

    monkeypatch.setattr(sizing, "peaks_by_device", peaks)
    runner = create_runner(
        checkpoint("tiny"), RunnerConfig(**SMALL), available=available(512 * MIB)
    )
    assert lens == [16384, 8192, 4096]
    assert runner.info.max_model_len == 4096


def test_the_context_shrinks_where_a_step_over_all_of_it_leaves_no_room() -> None:
    lens = [
        create_runner(
            checkpoint("tiny"), RunnerConfig(**SMALL), available=available(room)
        ).info.max_model_len
        for room in (16 * MIB, 64 * MIB, 512 * MIB)
    ]
    assert 2048 <= lens[0] < lens[1] <= lens[2] == 16384


def test_kv_cache_memory_wins_over_what_is_free() -> None:
    sizes = [
        create_runner(
            checkpoint("tiny"),
            RunnerConfig(**SMALL, max_model_len=512, kv_cache_bytes=4 * MIB),
            available=available(room),
        ).info.pools
        for room in (64 * MIB, 8 * GIB)
    ]
    assert sizes[0] == sizes[1]
    assert isinstance(sizes[0], PoolSizes)


def test_the_log_says_where_memory_goes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=sizing.__name__):
        runner = create_runner(
            checkpoint("tiny"),
            RunnerConfig(**SMALL, max_model_len=512),
            available=available(64 * MIB),
        )
    sizes = runner.info.pools
    tokens = f"{sizes.num_text_blocks * 16:,} tokens"
    line = next(one.message for one in caplog.records if one.message.startswith("memory of"))
    assert line.startswith("memory of cpu: weights 1.3 MiB, activations of a step ")
    assert f"({tokens}), image pool" in line
    assert line.endswith(f"({sizes.num_image_blocks:,} tiles)")


def test_the_least_device_decides_how_many_blocks_there_are() -> None:
    request = PoolRequest(1000, None, 8, 4, 16, token_bytes=100, tile_bytes=5000)
    text_only = replace(request, tile_bytes=0)
    plan = plan_over_devices([request, text_only], [10**9, 160_000])
    assert plan.sizes == PoolSizes(100, 64, 16)
    assert plan.max_model_len == 1000


def test_a_model_that_the_cpu_cannot_hold_lies_on_disk_and_answers_alike(
    caplog: pytest.LogCaptureFixture,
) -> None:
    need = SMALL | {"max_model_len": 256, "max_num_seqs": 1}
    whole = create_runner(checkpoint("tiny"), RunnerConfig(**need))
    # weights are 1.3 MiB: a step and the caches fit with one layer and the vision model at most
    taken = peak_bytes(whole.config, StepLimits(1, 64, 1, 256), torch.float32).most + MIB
    with caplog.at_level(logging.INFO):
        split = create_runner(
            checkpoint("tiny"),
            RunnerConfig(**need, device_map="auto"),
            available=available(taken + MIB // 4),
        )
    on_disk = [weight for weight in split._model.parameters() if weight.is_meta]
    assert on_disk
    answers = []
    for runner in (whole, split):
        request = prompt("r", "what is this")
        generate(runner, [request], num_tokens=5, chunk=100)
        answers.append(request.generated)
    assert answers[0] == answers[1]


def test_a_runner_makes_its_device_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device: on `cuda:1` it was given what lay elsewhere."""
    made: list[torch.device] = []

    def note(device: torch.device) -> None:
        made.append(device)
        raise ModelError("far enough")

    monkeypatch.setattr("vlmserve.models.create_runner.choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", note)
    with pytest.raises(ModelError, match="far enough"):
        create_runner(checkpoint("tiny"), RunnerConfig(**SMALL | {"device": "cuda:1"}))
    assert made == [torch.device("cuda", 1)]


# nvidia-smi's totals of an A10 or L4 and of a 4090; torch and its context take about half a GiB
CARDS = {"A10 or L4": 23_034 * MIB, "4090": 24_564 * MIB}


@pytest.mark.parametrize("card", CARDS)
def test_a_24_gb_card_with_int8_has_room_for_12_pictures_and_20_000_tokens(
    card: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the computed peak; desk check: 6 pictures and 10,000 tokens when all layers were kept."""
    total, context = CARDS[card], GIB // 2
    gpu = torch.device("cuda", 0)
    checkpoint = random_checkpoint(layout("11b"), torch.bfloat16)
    plan = plan_of(checkpoint, RunnerConfig(quantize="int8"), WHOLE)
    plan = replace(plan, pools=replace(plan.pools, block_size=16))
    placement = on_one_device(checkpoint.meta_model, gpu)
    model = LoadedModel(checkpoint.meta_model, checkpoint.normalization, checkpoint.folder,
        placement, checkpoint.dtype, LayerCount(checkpoint.meta_model))  # fmt: skip
    used = [context]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (total - used[0], total))
    before = available_memory(gpu, 0.9).num_bytes
    used[0] += needs_on(placement, needs_of(plan), gpu).resident_bytes

    def computed(loaded: Any, attention: Any, limits: StepLimits, with_graphs: bool) -> Any:
        return {gpu: peak_bytes(loaded.model.config, limits, loaded.dtype).most}

    monkeypatch.setattr(sizing, "measure_peak", computed)
    readings = MemoryReadings(partial(available_memory, gpu_memory_utilization=0.9), {gpu: before})
    any_backend: Any = None
    sized = size_pools(plan, model, any_backend, readings, None, with_graphs=False).sizes
    assert sized.num_image_blocks >= 12 * 4
    assert sized.num_text_blocks * sized.block_size >= 20_000
