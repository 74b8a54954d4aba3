"""Quantized checkpoints: the same answers as their dequantized weights, and no more memory."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.coded_checkpoints import FORMS, Form, bnb4, kept_and_counted, set_config, write
from support.oracle import BLOCK_SIZE, PROMPTS, checkpoint, prefill_logits

from vlmserve.models.batch import PoolSizes
from vlmserve.models.decoder.coded.linear import CodedLinear
from vlmserve.models.decoder.coded.weight import CodedWeight
from vlmserve.models.decoder.decoder import is_fused
from vlmserve.models.errors import ModelError
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.kv_cache.pool_sizes import PoolPlan
from vlmserve.models.weights import loader
from vlmserve.models.weights.device_map import given_map
from vlmserve.models.weights.formats.coded_tensor import CodedTensor
from vlmserve.models.weights.formats.safetensors_headers import module_name
from vlmserve.models.weights.loader import LoadedModel, load, load_model, open_checkpoint

TINY = Path(checkpoint("tiny"))


def logits_of(loaded: LoadedModel, name: str) -> torch.Tensor:
    runner = ModelRunner(loaded, PoolPlan(PoolSizes(200, 40, BLOCK_SIZE), 800))
    return prefill_logits(runner, [PROMPTS[name]()], chunk=5)[name]


@functools.cache
def plain_logits(name: str) -> torch.Tensor:
    return logits_of(load_model(TINY, "cpu", "float32"), name)


# One of each packing in every run, all forms in the long one.
QUICK = {"fp8-channel", "w8a8", "w4a16-zeros", "nf4-nested", "gptq-act-order", "awq"}


@pytest.fixture(
    scope="module",
    params=[pytest.param(one, marks=() if one in QUICK else pytest.mark.slow) for one in FORMS],
)
def written(request, tmp_path_factory) -> tuple[Path, Path]:
    """A quantized checkpoint and its dequantized one."""
    return write(TINY, FORMS[request.param], tmp_path_factory.mktemp(request.param))


def test_logits_equal_those_of_the_dequantized_weights(written) -> None:
    coded, dequantized = written
    model = load_model(coded, "cpu", "float32")
    assert is_fused(model.model.model.language_model)
    plain = load_model(dequantized, "cpu", "float32")
    for name in ("text", "one", "apart"):
        torch.testing.assert_close(
            logits_of(model, name), logits_of(plain, name), atol=1e-4, rtol=1e-4
        )
    assert (logits_of(plain, "one") - plain_logits("one")).abs().max() > 1e-3


def test_weights_take_what_the_arithmetic_says(written) -> None:
    kept, counted, plain = kept_and_counted(written[0], TINY)
    assert kept == pytest.approx(counted, rel=0.1)
    assert counted < 0.5 * plain


@pytest.mark.parametrize("name", ["nf4-dynamic", "fp8-channel", "w4a16-zeros"])
def test_names_of_before_transformers_4_52_load(name, tmp_path) -> None:
    coded, dequantized = write(TINY, FORMS[name], tmp_path, has_old_names=True)
    model, plain = (load_model(folder, "cpu", "float32") for folder in (coded, dequantized))
    torch.testing.assert_close(
        logits_of(model, "one"), logits_of(plain, "one"), atol=1e-4, rtol=1e-4
    )


def test_layers_that_auto_round_adds_under_newer_names_are_ignored(tmp_path) -> None:
    """It takes them for missing. A layer's own tensors are those under the older name."""
    coded, dequantized = write(TINY, FORMS["auto-round"], tmp_path, has_old_names=True)
    tensors = load_file(coded / "model.safetensors")
    (coded / "model.safetensors").unlink()
    shard, extra = "model-00001-of-00001.safetensors", "model_extra_tensors.safetensors"
    added = {module_name(name): tensor * 2 for name, tensor in tensors.items()}
    save_file(tensors, coded / shard, metadata={"format": "pt"})
    save_file(added, coded / extra, metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(tensors, shard) | dict.fromkeys(added, extra)}
    (coded / "model.safetensors.index.json").write_text(json.dumps(index))
    model, plain = (load_model(folder, "cpu", "float32") for folder in (coded, dequantized))
    torch.testing.assert_close(
        logits_of(model, "one"), logits_of(plain, "one"), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["fp8-channel", "w8a8", "gptq-act-order", "nf4-nested"])
def test_a_bfloat16_model_answers_as_its_dequantized_weights_in_bfloat16(name, tmp_path) -> None:
    coded, dequantized = write(TINY, FORMS[name], tmp_path)
    model, plain = (load_model(folder, "cpu", "bfloat16") for folder in (coded, dequantized))
    difference = (logits_of(model, "one") - logits_of(plain, "one")).float().square().mean().sqrt()
    assert difference < 0.03 * logits_of(plain, "one").float().square().mean().sqrt()


def test_a_stale_key_over_plain_weights_is_ignored(tmp_path, caplog) -> None:
    """Fine-tunes keep the key of the 4-bit model that they started from."""
    folder = tmp_path / "stale"
    shutil.copytree(TINY, folder)
    set_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with caplog.at_level("INFO", logger="vlmserve"):
        model = load_model(folder, "cpu", "float32")
    assert "quantization_config (bitsandbytes) is ignored" in caplog.text
    assert torch.equal(
        logits_of(model, "one"), logits_of(load_model(TINY, "cpu", "float32"), "one")
    )
    quantized = load_model(folder, "cpu", "float32", quantize="int8")
    assert logits_of(quantized, "text").isfinite().all()


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path) -> None:
    coded, _ = write(TINY, FORMS["fp8-channel"], tmp_path)
    with pytest.raises(ModelError, match="quantized already: remove --quantize int8"):
        load_model(coded, "cpu", "float32", quantize="int8")


def test_fp8_is_made_while_loading() -> None:
    model = load_model(TINY, "cpu", "float32", quantize="fp8")
    exact = logits_of(load_model(TINY, "cpu", "float32"), "one")
    error = (logits_of(model, "one") - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < error < 0.15


@pytest.mark.parametrize(
    ("name", "value"),
    [("w4a16-groups", torch.nan), ("w4a16-groups", -1e9), ("nf4", torch.inf), ("gptq", torch.nan)],
)
def test_scales_that_no_weight_has_are_named(name, value, tmp_path) -> None:
    """llm-compressor writes such ones for layers that its calibration does not reach."""

    def broken(weight):
        parts, whole = FORMS[name].code(weight)
        scale = next(
            one for key, one in parts.items() if key.endswith(("scale", "scales", "absmax"))
        )
        scale[(0,) * scale.dim()] = value
        return parts, whole

    coded, _ = write(TINY, Form(broken, FORMS[name].settings), tmp_path)
    with pytest.raises(
        ModelError, match=r"scales that are NaN or too large.*calibrate with images"
    ):
        load_model(coded, "cpu", "float32")


def test_nan_in_fp8_is_named(tmp_path) -> None:
    def with_nan(weight):
        parts, whole = FORMS["fp8-channel"].code(weight)
        parts["weight"].view(torch.uint8)[3, 5] = 0xFF
        return parts, whole

    coded, _ = write(TINY, Form(with_nan, FORMS["fp8-channel"].settings), tmp_path)
    with pytest.raises(ModelError, match=r"_proj\.weight has NaN in FP8: download model\.safe"):
        load_model(coded, "cpu", "float32")


@pytest.mark.parametrize("name", ["fp8-channel", "gptq-act-order"])
def test_a_device_map_over_several_devices_is_one_line(name, tmp_path) -> None:
    coded, _ = write(TINY, FORMS[name], tmp_path)
    opened = open_checkpoint(coded, torch.float32)
    placement = given_map({"": "cpu", "lm_head": "disk"}, opened.meta_model, 0, "a test")
    with pytest.raises(ModelError, match="does not work with a --device-map over several devices"):
        load(opened, placement)


def test_a_plain_checkpoint_runs_no_code_of_quantized_ones(monkeypatch) -> None:
    """Its load and its steps are those of before: what coded weights need is never called."""

    def fail(*args, **kwargs):
        raise AssertionError("a plain checkpoint came here")

    monkeypatch.setattr(CodedWeight, "__init__", fail)
    monkeypatch.setattr(CodedLinear, "__init__", fail)
    monkeypatch.setattr(CodedTensor, "__init__", fail)
    monkeypatch.setattr(loader, "load_tensors", fail)
    model = load_model(TINY, "cpu", "float32")
    kinds = {type(module).__name__ for module in model.model.modules()}
    assert not {kind for kind in kinds if "Coded" in kind or "Int8" in kind}
    assert torch.equal(logits_of(model, "one"), plain_logits("one"))


def test_a_damaged_layer_is_named_before_a_weight_is_read(tmp_path) -> None:
    def without_table(weight):
        parts, whole = bnb4("nf4", nested=False)(weight)
        del parts["weight.quant_map"]
        return parts, whole

    form = Form(without_table, FORMS["nf4"].settings)
    coded, _ = write(TINY, form, tmp_path)
    with pytest.raises(ModelError, match=r"down_proj cannot be read as quantized: its quant_state"):
        open_checkpoint(coded, torch.float32)
