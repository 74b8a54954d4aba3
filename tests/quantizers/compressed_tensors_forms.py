"""Quantizes a checkpoint with compressed-tensors, in its own environment.

    python compressed_tensors_forms.py SOURCE FORM CODED DEQUANTIZED

Scales are those of the smallest and largest weight. The package packs, and unpacks what it packed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams
from saving import run, save
from transformers import MllamaForConditionalGeneration

# as RedHatAI/Llama-3.2-11B-Vision-Instruct-FP8-dynamic names them
IGNORED = ["re:.*lm_head", "re:.*multi_modal_projector.*", "re:.*vision_model.*"]
GROUP = 32


def _packed(bits: int, *, symmetric: bool, group: int | None) -> QuantizationScheme:
    strategy = "group" if group else "channel"
    weights = QuantizationArgs(
        num_bits=bits, type="int", strategy=strategy, group_size=group, symmetric=symmetric
    )
    return QuantizationScheme(targets=["Linear"], weights=weights)


def scheme_of(form: str) -> QuantizationScheme:
    """The scheme of that name."""
    if form in ("fp8-dynamic", "fp8-static", "w8a8"):
        preset = {"fp8-dynamic": "FP8_DYNAMIC", "fp8-static": "FP8", "w8a8": "W8A8"}[form]
        return preset_name_to_scheme(preset, ["Linear"])
    return {
        "w4a16-groups": _packed(4, symmetric=True, group=GROUP),
        "w4a16-zeros": _packed(4, symmetric=False, group=GROUP),
        "w4a16-channel": _packed(4, symmetric=True, group=None),
        "w8a16-groups": _packed(8, symmetric=True, group=GROUP),
    }[form]


def _set_scales(module: Any) -> None:
    """Each group's scale and zero point from its extremes."""
    args, weight = module.quantization_scheme.weights, module.weight.data
    strategy = str(getattr(args.strategy, "value", args.strategy))
    groups = {"tensor": weight.reshape(1, 1, -1), "channel": weight[:, None]}
    parts = groups.get(strategy)
    if parts is None:
        parts = weight.reshape(len(weight), -1, args.group_size)
    scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
    module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))
    if hasattr(module, "input_scale"):  # of static activations
        module.input_scale.data.fill_(0.05)


def main(source: Path, form: str, coded: Path, dequantized: Path | None) -> None:
    """Write both checkpoints, or the quantized one alone."""
    model = MllamaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    config = QuantizationConfig(config_groups={"group_0": scheme_of(form)}, ignore=IGNORED)
    apply_quantization_config(model, config)
    count = 0
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            _set_scales(module)
            count += 1
    assert count, "nothing is quantized"
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    save(model, source, coded)
    compressor.update_config(str(coded))
    if dequantized is None:
        return
    compressor.decompress_model(model)
    plain = MllamaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    names = set(plain.state_dict())
    whole = {name: one for name, one in model.state_dict().items() if name in names}
    plain.load_state_dict(whole)
    save(plain, source, dequantized)


if __name__ == "__main__":
    run(main)
