"""Models that cannot fit are refused before a weight is read, with the sum and what would help."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.client_environments import ROOT
from support.coded_checkpoints import FORMS, write
from support.oracle import checkpoint
from transformers import MllamaConfig, MllamaForConditionalGeneration

from vlmserve.models.create_runner import create_runner
from vlmserve.models.errors import ModelError
from vlmserve.models.kernels import float32_products
from vlmserve.models.kv_cache.pool_sizes import PoolRequest
from vlmserve.models.memory.available import AvailableMemory
from vlmserve.models.memory.fit import Plan, check_fits, needs_of, needs_on
from vlmserve.models.memory.fit_report import report
from vlmserve.models.memory.peak_step import StepLimits
from vlmserve.models.settings.byte_text import shown_bytes
from vlmserve.models.settings.runner_config import RunnerConfig
from vlmserve.models.weights import loader
from vlmserve.models.weights.device_map import given_map, on_one_device
from vlmserve.models.weights.loader import open_checkpoint
from vlmserve.models.weights.tensor_loader import RankShare
from vlmserve.server.cli.check import cell

CPU = torch.device("cpu")
KIB, MIB = 1 << 10, 1 << 20
SMALL: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "max_num_seqs": 1,
    "max_num_batched_tokens": 64,
    "max_num_batched_images": 1,
    "num_threads": torch.get_num_threads(),
}


@pytest.fixture(autouse=True)
def no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_read_weights", lambda *args: pytest.fail("weights were read"))


def available(num_bytes: int) -> Callable[[torch.device], AvailableMemory]:
    return lambda device: AvailableMemory(num_bytes, "as a test says")


def plan(quantize: str | None = None, max_model_len: int | None = None) -> Plan:
    opened = open_checkpoint(checkpoint("tiny"), torch.float32)
    pools = PoolRequest(16384, max_model_len, 1, 4, 16, token_bytes=768, tile_bytes=3840)
    limits = StepLimits(1, 64, 1, max_model_len or 16384)
    return Plan(opened, limits, pools, quantize, has_inserted=True)


def refusal(room: int, **settings: Any) -> str:
    with pytest.raises(ModelError) as raised:
        create_runner(
            checkpoint("tiny"), RunnerConfig(**(SMALL | settings)), available=available(room)
        )
    assert "\n" not in str(raised.value)
    return str(raised.value)


def in_bytes(text: str) -> float:
    amount, unit = text.split()
    return float(amount) * {"B": 1, "KiB": KIB, "MiB": MIB, "GiB": MIB * KIB}[unit]


def test_the_refusal_shows_a_sum_that_adds_up() -> None:
    line = refusal(MIB)
    amount = r"([\d.]+ [KMG]?i?B)"
    found = re.search(
        rf"weights {amount} \(vision {amount}, decoder {amount}, embedding and head {amount}\) \+ "
        rf"KV cache of at least {amount} \(2,048 text tokens, 4 image tiles\) \+ activations of a "
        rf"step {amount} = {amount}, and 1\.0 MiB are available \(as a test says\)",
        line,
    )
    assert found, line
    weights, vision, decoder, table, cache, peak, total = map(in_bytes, found.groups())
    assert weights == pytest.approx(vision + decoder + table, rel=0.1)
    assert total == pytest.approx(weights + cache + peak, rel=0.1)
    assert line.startswith(checkpoint("tiny"))
    assert "does not fit cpu" in line


def test_the_quantizations_that_would_fit_are_named_and_no_others() -> None:
    totals = {m: needs_of(plan(m)).total for m in (None, "bitsandbytes", "bitsandbytes-nf4")}
    assert totals["bitsandbytes-nf4"] < totals["bitsandbytes"] < (totals[None] or 0)
    line = refusal(totals["bitsandbytes"])
    assert "use --quantize int8 (" in line
    assert ", or --quantize bitsandbytes (" in line
    assert "--quantize bitsandbytes-nf4 (" in line
    line = refusal(totals["bitsandbytes-nf4"])
    assert "--quantize int8 (" not in line
    assert "--quantize bitsandbytes (" not in line
    assert "use --quantize bitsandbytes-nf4 (" in line
    line = refusal(totals["bitsandbytes-nf4"] - 1)
    assert "--quantize" not in line
    assert "--device-map auto" in line


def advice(plan: Plan, num_bytes: int) -> str:
    placement = on_one_device(plan.checkpoint.meta_model, CPU)
    with pytest.raises(ModelError) as raised:
        check_fits(plan, placement, available(num_bytes))
    return str(raised.value)


def test_ranks_are_advised_what_works_with_them_and_a_checkpoint_in_4_bits() -> None:
    """bitsandbytes and --device-map do not work with --tensor-parallel-size."""
    ranks = replace(plan(), share=RankShare(0, 2, {}))
    line = advice(ranks, needs_of(replace(ranks, quantize="int8")).total)
    assert "use --quantize int8 (" in line
    assert "or a checkpoint in 4 bits (" in line
    assert "bitsandbytes" not in line
    assert "--device-map" not in line


def test_a_quantized_checkpoint_is_advised_neither_quantization_nor_offloading(tmp_path) -> None:
    coded, _ = write(Path(checkpoint("tiny")), FORMS["fp8-channel"], tmp_path)
    line = advice(replace(plan(), checkpoint=open_checkpoint(coded, torch.float32)), MIB)
    assert "--quantize" not in line
    assert "--device-map" not in line


def test_a_quantized_model_is_not_advised_its_own_method() -> None:
    line = refusal(needs_of(plan("bitsandbytes-nf4")).total, quantize="bitsandbytes")
    assert "use --quantize bitsandbytes-nf4 (" in line
    assert "--quantize bitsandbytes (" not in line


def test_a_shorter_max_model_len_is_named_where_it_would_fit() -> None:
    line = refusal(needs_of(plan(max_model_len=4096)).total, max_model_len=16384)
    assert "(16,384 text tokens" in line
    assert "use --max-model-len 4096, or " in line


def test_a_smaller_kv_cache_memory_is_named_where_it_would_fit() -> None:
    room = needs_of(plan()).total
    assert "use a smaller --kv-cache-memory" in refusal(room, kv_cache_bytes=room)


def test_what_just_fits_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reading(Exception):
        pass

    def read(*args: Any) -> None:
        raise Reading

    monkeypatch.setattr(loader, "_read_weights", read)
    need = needs_of(plan()).total
    with pytest.raises(Reading):
        create_runner(checkpoint("tiny"), RunnerConfig(**SMALL), available=available(need))
    assert "does not fit" in refusal(need - 1)


def test_a_map_that_does_not_fit_names_the_device_and_not_a_quantization() -> None:
    needs = needs_of(plan())
    entries = {"": "cpu", "lm_head": "disk"}
    meta_model = plan().checkpoint.meta_model
    share = needs_on(given_map(entries, meta_model, 0, "map"), needs, CPU)
    whole = needs_on(on_one_device(meta_model, CPU), needs, CPU)
    head = needs.weights["lm_head"]
    assert share.resident_bytes == whole.resident_bytes - head
    assert share.largest_offloaded == head
    assert share.total == whole.total


def test_weights_that_wait_on_the_cpu_beside_a_gpu_must_fit_there_too() -> None:
    asked = plan()
    placement = given_map({"": 0, "lm_head": "cpu"}, asked.checkpoint.meta_model, 1, "map")
    gpu = torch.device("cuda", 0)
    head = needs_of(asked).weights["lm_head"]
    assert needs_on(placement, needs_of(asked), CPU).total == head
    assert needs_on(placement, needs_of(asked), gpu).largest_offloaded == head
    memory = {gpu: AvailableMemory(64 * MIB, "free"), CPU: AvailableMemory(head - 1, "little")}
    with pytest.raises(ModelError, match=r"does not fit cpu: weights .* \(embedding and head"):
        check_fits(asked, placement, memory.__getitem__)


def test_a_map_of_a_file_is_checked_before_weights_are_read(tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    file.write_text(json.dumps({"": "disk"}))
    line = refusal(MIB, device_map=str(file))
    assert "+ offloaded weights" in line
    assert "a --device-map or --max-memory that leaves more memory there" in line


def test_max_memory_without_a_device_that_is_there_is_refused() -> None:
    line = refusal(MIB, max_memory={"0": MIB})
    assert "--max-memory names unknown device '0': use cpu" in line
    file = refusal(MIB, max_memory={"cpu": MIB}, device_map="map.json")
    assert "needs --device-map auto or balanced" in file


def test_max_model_len_over_the_context_is_refused_before_weights_are_read() -> None:
    assert "the model's context is 16,384" in refusal(8 << 30, max_model_len=20_000)


def with_a_hole(config: MllamaConfig, folder: Path) -> Path:
    """A checkpoint of a configuration: true headers before a hole in the place of the weights."""
    config.save_pretrained(folder)
    with torch.device("meta"):
        meta_model = MllamaForConditionalGeneration(config)
    entries, end = {}, 0
    for name, weight in meta_model.state_dict().items():
        offsets = [end, end := end + 2 * weight.numel()]
        entries[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": offsets}
    header = json.dumps(entries).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    shutil.copy(Path(checkpoint("tiny")) / "preprocessor_config.json", folder)
    return folder


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of Llama-3.2-11B-Vision's shapes."""
    config = MllamaConfig(vision_config={"image_size": 560})
    return with_a_hole(config, tmp_path_factory.mktemp("large"))


# The shapes of Llama-3.2-90B-Vision's text model.
TEXT_90B = {
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 100,
    "cross_attention_layers": list(range(3, 100, 5)),
}


@pytest.mark.slow
def test_the_documented_table_of_gpus_is_that_of_check(large_folder: Path, tmp_path: Path) -> None:
    config = MllamaConfig(vision_config={"image_size": 560}, text_config=TEXT_90B)
    folders = {"11B": large_folder, "90B": with_a_hole(config, tmp_path)}
    lines = []
    for name, folder in folders.items():
        rows = {row["quantize"]: row for row in report(folder)["rows"]}
        assert rows["int8"]["gpus"] == rows["fp8"]["gpus"]
        said = {
            name: None,
            f"{name}, `int8` or `fp8`": "int8",
            f"{name}, a 4-bit checkpoint": "int4",
        }
        for words, method in said.items():
            cells = [shown_bytes(rows[method]["weights"]), *map(cell, rows[method]["gpus"])]
            lines.append(f"| {words} | {' | '.join(cells)} |")
    documented = (ROOT / "docs" / "loading.md").read_text().splitlines()
    assert [line for line in documented if line.startswith(("| 11B", "| 90B"))] == lines


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {},
            "weights 19.9 GiB (vision 1.7 GiB, decoder 16.3 GiB, embedding and head 2.0 GiB) + KV "
            "cache of at least 456.1 MiB (2,048 text tokens, 4 image tiles) + activations of a "
            "step 819.0 MiB = 21.1 GiB, and 17.6 GiB are available (as a test says): use "
            "--quantize int8 (13.0 GiB in all), or --quantize fp8 (13.0 GiB in all), or --quantize "
            "bitsandbytes (13.0 GiB in all), or --quantize bitsandbytes-nf4 (9.4 GiB in all), or "
            "--device-map auto, which offloads the weights that do not fit",
        ),
        (
            {"max_model_len": 131_072},
            "(131,072 text tokens, 4 image tiles) + activations of a step 1.7 GiB = 37.8 GiB, and "
            "17.6 GiB are available (as a test says): use --quantize int8 with --max-model-len "
            "32768, or --device-map auto",
        ),
    ],
    ids=["by default", "its whole context"],
)
def test_llama_3_2_11b_is_refused_on_a_small_machine_with_its_true_sizes(
    large_folder: Path, settings: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Such a CPU needs more: the same figures on all of them.
    monkeypatch.setattr(float32_products, "is_bfloat16_slow", lambda: False)
    with pytest.raises(ModelError) as raised:
        create_runner(
            str(large_folder),
            RunnerConfig(
                device="cpu", dtype="bfloat16", num_threads=torch.get_num_threads(), **settings
            ),
            available=available(int(17.6 * 2**30)),
        )
    assert told in str(raised.value)


def test_products_in_float32_take_memory_of_a_step() -> None:
    asked = replace(plan(), limits=StepLimits(1, 2048, 1, 2048))
    widened = needs_of(replace(asked, is_widened=True)).peak
    narrow = needs_of(asked).peak
    assert widened.text > narrow.text


def test_fewer_images_a_step_are_named_where_they_would_fit() -> None:
    asked = plan()
    one = needs_of(asked).total
    more = replace(asked, limits=replace(asked.limits, max_num_batched_images=64))
    assert needs_of(more).total > one
    assert "use --max-num-batched-images 1, or " in refusal(one, max_num_batched_images=64)
