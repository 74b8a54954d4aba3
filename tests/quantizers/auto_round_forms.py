"""Quantizes a checkpoint with auto-round, in its own environment.

    python auto_round_forms.py SOURCE FORM CODED DEQUANTIZED

Without calibration (iters=0), which needs no data. The package packs, and its own layers decode the
files. It gives layers their names of before transformers 4.52, takes those of SOURCE for missing,
and adds them in a file with an index: the whole file has every weight.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from auto_round.export.export_to_awq.utils import dequantize_gemm
from auto_round.inference.backend import GPTQ_FORMAT_NO_ZP
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
from safetensors.torch import load_file
from saving import run, save
from transformers import AutoTokenizer, MllamaForConditionalGeneration

GROUP = 32
# packing, bits, symmetric
FORMS: dict[str, tuple[str, int, bool]] = {
    "auto-round": ("auto_round", 4, True),
    "auto-round-zeros": ("auto_round", 4, False),
    "auto-round-zeros-v2": ("auto_round:gptqmodel", 4, False),
    "gptq-zeros": ("auto_gptq", 4, False),
    "gptq-8": ("auto_gptq", 8, True),
    "awq": ("auto_awq", 4, False),
}


def quantize(source: Path, form: str, folder: Path) -> None:
    """Write the quantized checkpoint."""
    packing, bits, symmetric = FORMS[form]
    AutoRound(
        MllamaForConditionalGeneration.from_pretrained(source, dtype=torch.float32),
        AutoTokenizer.from_pretrained(source),
        bits=bits,
        group_size=GROUP,
        sym=symmetric,
        iters=0,
        disable_opt_rtn=True,
        device_map="cpu",
    ).quantize_and_save(str(folder / "saved"), format=packing)
    # into a folder of the scheme's name
    for file in next(folder.rglob("config.json")).parent.iterdir():
        shutil.move(file, folder)


def main(source: Path, form: str, coded: Path, dequantized: Path | None) -> None:
    """Write both checkpoints, or the quantized one alone."""
    quantize(source, form, coded)
    if dequantized is None:
        return
    plain = MllamaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    settings = json.loads((coded / "config.json").read_text())["quantization_config"]
    tensors = load_file(coded / "model.safetensors")
    layers = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    assert layers, "nothing is quantized"
    for layer in layers:
        name = layer.replace("language_model.model.", "model.language_model.")
        parts = {key: tensors.get(f"{layer}.{key}") for key in ("qweight", "qzeros", "scales")}
        plain.get_submodule(name).weight.data = decoded(parts, settings)
    save(plain, source, dequantized)


@torch.no_grad()
def decoded(parts: dict[str, Any], settings: dict[str, Any]) -> torch.Tensor:
    """A layer's weight [out, in], as the package's own layers decode it, in float32."""
    parts["scales"] = parts["scales"].float()
    bits, packing = settings["bits"], settings.get("packing_format", settings["quant_method"])
    if "awq" in packing:
        return dequantize_gemm(**parts, bits=bits, group_size=GROUP).T.contiguous()
    module = qlinear_torch if packing in GPTQ_FORMAT_NO_ZP else qlinear_torch_zp
    num_in, num_out = len(parts["scales"]) * GROUP, parts["scales"].shape[1]
    layer = module.QuantLinear(bits, GROUP, num_in, num_out, bias=False)
    for name, tensor in parts.items():
        setattr(layer, name, tensor)
    return layer(torch.eye(num_in)).T.contiguous()


if __name__ == "__main__":
    run(main)
