"""Forms of checkpoints that are not served: one line each, before a weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.coded_checkpoints import FORMS, set_config, write
from support.oracle import checkpoint

from vlmserve.models.checkpoint import check_folder
from vlmserve.models.errors import ModelError
from vlmserve.models.weights.formats.recognition import check_hub_config, read_weights
from vlmserve.server.cli.model_source import ModelFilesError, resolve_model

LAYER = "model.language_model.layers.0.self_attn.q_proj"
TINY = Path(checkpoint("tiny"))


def folder_with(tmp_path: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """A folder whose weights are only these tensors of one layer."""
    config = {"model_type": "mllama", "text_config": {}, **config}
    (tmp_path / "config.json").write_text(json.dumps(config))
    named = {f"{LAYER}.{suffix}": tensor for suffix, tensor in tensors.items()}
    save_file(named, tmp_path / "model.safetensors")
    return tmp_path


def quantized(**settings: Any) -> dict[str, Any]:
    return {"quantization_config": settings}


WORDS = torch.zeros(8, 64, dtype=torch.int32)
CODES = {"weight": torch.zeros(64, 64, dtype=torch.int8), "weight_scale": torch.ones(64, 1)}
GPTQ = {
    "qweight": WORDS,
    "qzeros": torch.zeros(2, 8, dtype=torch.int32),
    "scales": torch.ones(2, 64),
}
REFUSED: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "MLX": (
        {
            "weight": WORDS.view(torch.uint32),
            "scales": torch.ones(8, 1),
            "biases": torch.ones(8, 1),
        },
        {"quantization": {"group_size": 64, "bits": 4}},
        "quantized with mlx, which is not served",
    ),
    "exl2": (
        {"q_weight": WORDS, "q_scale": WORDS.clone()},
        quantized(quant_method="exl2", bits=4.5),
        "quantized with exl2, which is not served",
    ),
    "an unknown method": (
        {"weight": torch.zeros(8, 8, dtype=torch.uint8)},
        quantized(quant_method="hqq"),
        "quantized with hqq, which is not served",
    ),
    "a method without a name": (
        {"weight": torch.zeros(8, 8, dtype=torch.uint8)},
        quantized(bits=4),
        "quantized with a method without a name, which is not served",
    ),
    "codes without scales": (
        {"weight": torch.zeros(8, 8, dtype=torch.uint8)},
        {},
        "is stored as U8 without scales that are known",
    ),
    "another format of compressed-tensors": (
        {"weight_packed": torch.zeros(8, 8, dtype=torch.uint8), "weight_scale": torch.ones(8, 1)},
        quantized(quant_method="compressed-tensors", format="nvfp4-pack-quantized"),
        "format nvfp4-pack-quantized, which is not served",
    ),
    "GPTQ in 3 bits": (
        GPTQ | {"qzeros": torch.zeros(2, 6, dtype=torch.int32)},
        quantized(quant_method="gptq", bits=3),
        "gptq in 3 bits; served are 4 and 8 bits",
    ),
    "GPTQ of an unknown version": (
        GPTQ,
        quantized(quant_method="gptq", bits=4, checkpoint_format="gptq_v9"),
        "checkpoint_format gptq_v9, which is not served",
    ),
    "GPTQ packed for Marlin": (
        {"B": WORDS, "s": torch.ones(2, 64)},
        quantized(quant_method="gptq", bits=4, is_marlin_format=True),
        "packed for Marlin, which is not served",
    ),
    "GPTQ packed for Marlin, as newer files say it": (
        {"B": WORDS, "s": torch.ones(2, 64)},
        quantized(quant_method="gptq", bits=4, checkpoint_format="marlin"),
        "checkpoint_format marlin, which is not served",
    ),
    "rotated activations": (
        CODES,
        quantized(
            quant_method="compressed-tensors",
            format="int-quantized",
            transform_config={"config_groups": {"R3": {"type": "hadamard"}}},
        ),
        "with a transform_config, which is not served",
    ),
    "FP8 in blocks": (
        {"weight": torch.zeros(64, 64).to(torch.float8_e4m3fn), "weight_scale": torch.ones(2, 2)},
        quantized(quant_method="compressed-tensors", format="float-quantized"),
        r"scales of the shape \[2, 2\] are not served",
    ),
    "AWQ in another layout": (
        GPTQ,
        quantized(quant_method="awq", bits=4, version="gemv"),
        r"version gemv, which is not served \(served: gemm\)",
    ),
    "auto-round in another packing": (
        GPTQ,
        quantized(quant_method="auto-round", bits=4, packing_format="auto_round:mlx"),
        "packing_format auto_round:mlx, which is not served",
    ),
    "packed weights of no named packing": (
        GPTQ,
        {},
        "config.json does not say how its qweight is packed",
    ),
    "compressed-tensors in 2 bits": (
        {
            "weight_packed": torch.zeros(64, 4, dtype=torch.int32),
            "weight_scale": torch.ones(64, 1),
            "weight_shape": torch.tensor([64, 64]),
        },
        quantized(quant_method="compressed-tensors", format="pack-quantized"),
        "served in 4 or 8 bits, and these are in another width",
    ),
    "a weight of unknown codes": (
        CODES | {"weight": torch.zeros(64, 64, dtype=torch.uint8)},
        quantized(quant_method="compressed-tensors", format="float-quantized"),
        "a weight of type U8 beside weight_scale is not served",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_form_that_is_not_served_is_one_line_that_names_it(name, tmp_path) -> None:
    tensors, config, expected = REFUSED[name]
    folder = folder_with(tmp_path, tensors, **config)
    with pytest.raises(ModelError, match=expected) as caught:
        read_weights(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


METHODS = [
    *("aqlm", "bitnet", "eetq", "exl2", "exl3", "fbgemm_fp8", "fp8", "fp_quant", "higgs", "hqq"),
    *("modelopt", "mxfp4", "quanto", "quark", "sinq", "spqr", "torchao", "vptq"),
]


@pytest.mark.parametrize("method", METHODS)
def test_every_other_method_is_named_before_a_download_and_before_a_load(method, tmp_path) -> None:
    """Even where its tensors look like those of a form that is served, as fbgemm_fp8's do."""
    settings = quantized(quant_method=method)
    expected = f"quantized with {method}, which is not served; use the 16-bit checkpoint"
    with pytest.raises(ModelError, match=expected):
        check_hub_config({"model_type": "mllama", **settings}, "org/model")
    fp8 = CODES | {"weight": torch.zeros(64, 64).to(torch.float8_e4m3fn)}
    folder = folder_with(tmp_path, fp8, **settings)
    with pytest.raises(ModelError, match=expected) as caught:
        read_weights(folder)
    assert "\n" not in str(caught.value)


def test_gguf_is_named(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mllama"}))
    (tmp_path / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="in GGUF, the format of llama"):
        check_folder(tmp_path)
    (tmp_path / "config.json").unlink()
    for path in (tmp_path, tmp_path / "model.Q4_K_M.gguf"):
        with pytest.raises(ModelFilesError, match="in GGUF, the format of llama"):
            resolve_model(str(path))


def test_a_hub_id_of_an_unknown_method_is_refused_before_its_download() -> None:
    config = {"model_type": "mllama", **quantized(quant_method="exl2")}
    with pytest.raises(ModelError, match="org/model: the checkpoint is quantized with exl2"):
        check_hub_config(config, "org/model")
    check_hub_config(config | quantized(quant_method="bitsandbytes"), "org/model")


def test_an_index_of_an_earlier_save_beside_a_whole_file_is_ignored(tmp_path, caplog) -> None:
    folder = shutil.copytree(TINY, tmp_path / "both")
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with caplog.at_level("INFO", logger="vlmserve"):
        check_folder(folder)
        found = read_weights(folder)
    assert {tensor.file for tensor in found.values()} == {"model.safetensors"}
    assert "model.safetensors.index.json is ignored" in caplog.text


def test_settings_in_a_part_of_the_configuration_count_too(tmp_path) -> None:
    coded, _ = write(TINY, FORMS["gptq"], tmp_path)
    config = json.loads((coded / "config.json").read_text())
    settings = config.pop("quantization_config")
    config["text_config"]["quantization_config"] = settings
    (coded / "config.json").write_text(json.dumps(config))
    assert read_weights(coded)[f"{LAYER}.weight"].shape == (64, 64)
    set_config(coded, text_config={})
    with pytest.raises(ModelError, match="does not say how"):
        read_weights(coded)
