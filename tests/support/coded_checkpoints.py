"""Writes quantized checkpoints by hand, each beside one of its dequantized weights.

Owns the packings, from the formats' formulas and without this project's readers. A form changes a
layer's weight into the tensors of its files and the weight that they stand for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmserve.models.memory.estimate import part_bytes
from vlmserve.models.weights.device_map import parts_of
from vlmserve.models.weights.loader import load_model, open_checkpoint

GROUP = 32
NF4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461]
NF4 += [0.3379, 0.4407, 0.5626, 0.7230, 1.0]
FP4 = [0.0, 0.0052, 0.6667, 1.0, 0.3333, 0.5, 0.1667, 0.25]
FP4 += [-0.0, -0.0052, -0.6667, -1.0, -0.3333, -0.5, -0.1667, -0.25]
OLD_PREFIXES = {
    "lm_head.": "language_model.lm_head.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "model.vision_model.": "vision_model.",
}

# a layer's tensors by suffix, and the weight that they stand for
Coded = tuple[dict[str, Tensor], Tensor]


@dataclass(frozen=True)
class Form:
    """A format: how a weight is coded, and the settings in config.json."""

    code: Callable[[Tensor], Coded]
    settings: dict[str, Any]
    covers_vision: bool = False
    skips: tuple[str, ...] = field(default_factory=tuple)

    def covers(self, name: str) -> bool:
        """Whether the form codes the weight of that name."""
        is_decoder = name.startswith("model.language_model.layers.") and "_proj.weight" in name
        linears = ("_proj.weight", "fc1.weight", "fc2.weight")
        is_vision = name.startswith("model.vision_model.") and name.endswith(linears)
        is_skipped = any(skipped in name for skipped in self.skips)
        return (is_decoder or (self.covers_vision and is_vision)) and not is_skipped


def write(
    plain: Path, form: Form, folder: Path, *, has_old_names: bool = False
) -> tuple[Path, Path]:
    """The quantized checkpoint and the plain one of its dequantized weights."""
    coded, dequantized = folder / "coded", folder / "dequantized"
    for target in (coded, dequantized):
        shutil.copytree(plain, target)
    tensors, whole = {}, _renamed(load_file(plain / "model.safetensors"), to_old=False)
    for name, weight in list(whole.items()):
        if not form.covers(name):
            tensors[name] = weight
            continue
        parts, whole[name] = form.code(weight.float())
        tensors |= {f"{name.removesuffix('.weight')}.{suffix}": t for suffix, t in parts.items()}
    tensors = _renamed(tensors, to_old=True) if has_old_names else tensors
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, coded / "model.safetensors", metadata={"format": "pt"})
    whole = {name: tensor.contiguous().clone() for name, tensor in whole.items()}
    save_file(whole, dequantized / "model.safetensors", metadata={"format": "pt"})
    set_config(coded, quantization_config=form.settings)
    return coded, dequantized


def _renamed(tensors: dict[str, Tensor], *, to_old: bool) -> dict[str, Tensor]:
    """Names of before transformers 4.52, or of today."""
    found = {}
    for name, tensor in tensors.items():
        for new, old in OLD_PREFIXES.items():
            source, target = (new, old) if to_old else (old, new)
            if name.startswith(source):
                name = target + name.removeprefix(source)
                break
        found[name] = tensor
    return found


def kept_and_counted(coded: Path, plain: Path) -> tuple[int, int, int]:
    """Bytes of the decoder's layers once loaded in float32, those of the arithmetic, and the
    arithmetic of the plain weights.

    Without both values of a byte and tables, 2 kB a product: they weigh much in a model this small.
    """
    counted = []
    for folder in (coded, plain):
        opened = open_checkpoint(folder, torch.float32)
        sizes = part_bytes(parts_of(opened.meta_model), opened.tensors, torch.float32)
        counted.append(sum(size for part, size in sizes.items() if ".layers." in part))
    layers = load_model(coded, "cpu", "float32").model.model.language_model.layers
    kept = sum(one.nbytes for one in [*layers.parameters(), *layers.buffers()])
    tables = sum(b.nbytes for n, b in layers.named_buffers() if n.endswith(("_pairs", ".table")))
    return kept - tables, counted[0], counted[1]


def set_config(folder: Path, **values: Any) -> None:
    """Set keys of a checkpoint's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def grid(
    weight: Tensor, bits: int, group: int, *, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes from 0 [out, in], scales and zero points [out, groups] by the nearest-value rule."""
    parts = weight.view(len(weight), -1, group)
    top = 2**bits - 1
    if symmetric:
        scales = parts.abs().amax(-1) / (top // 2)
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    else:
        low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
        scales = (high - low) / top
        zeros = (-low / scales).round()
    codes = (parts / scales[..., None] + zeros[..., None]).round().clamp(0, top)
    return codes.view(weight.shape), scales, zeros


def ungrid(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The weight of a grid."""
    parts = codes.view(len(codes), scales.shape[1], -1)
    return ((parts - zeros[..., None]) * scales[..., None]).view(codes.shape)


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes packed along the last dimension into int32 words, the first in the lowest bits."""
    per = 32 // bits
    found = codes.numpy().astype(np.uint64).reshape(*codes.shape[:-1], -1, per)
    packed = sum(found[..., i] << np.uint64(bits * i) for i in range(per))
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32))


def fp8(per_tensor: bool) -> Callable[[Tensor], Coded]:
    """compressed-tensors float-quantized."""

    def code(weight: Tensor) -> Coded:
        largest = (
            weight.abs().max().reshape(1) if per_tensor else weight.abs().amax(1, keepdim=True)
        )
        scale = (largest / 448).bfloat16()
        codes = (weight / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        parts = {"weight": codes, "weight_scale": scale}
        if per_tensor:  # of static activations
            parts["input_scale"] = torch.tensor([0.5])
        return parts, codes.float() * scale.float()

    return code


def int8(weight: Tensor) -> Coded:
    """compressed-tensors int-quantized."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def pack(bits: int, *, symmetric: bool, group: int = GROUP) -> Callable[[Tensor], Coded]:
    """compressed-tensors pack-quantized; group 0: one a channel."""

    def code(weight: Tensor) -> Coded:
        codes, scales, zeros = grid(weight, bits, group or weight.shape[1], symmetric=symmetric)
        parts = {
            "weight_packed": words(codes, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            parts["weight_zero_point"] = words(zeros.T.contiguous(), bits).T
        return parts, ungrid(codes, scales, zeros)

    return code


def bnb4(kind: str, *, nested: bool) -> Callable[[Tensor], Coded]:
    """bitsandbytes in 4 bits."""
    table = torch.tensor(NF4 if kind == "nf4" else FP4)

    def code(weight: Tensor) -> Coded:
        flat = weight.flatten()
        blocks = torch.nn.functional.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
        absmax = blocks.abs().amax(1)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16"}
        state["shape"] = list(weight.shape)
        parts: dict[str, Tensor] = {"weight.quant_map": table}
        if nested:
            offset, nested_table = absmax.mean(), torch.linspace(-1, 1, 256)
            centred = absmax - offset
            groups = torch.nn.functional.pad(centred, (0, -len(centred) % 256)).view(-1, 256)
            largest = groups.abs().amax(1).clamp(min=1e-8)
            ratio = centred / largest.repeat_interleave(256)[: len(centred)]
            byte = (ratio[:, None] - nested_table).abs().argmin(1)
            absmax = nested_table[byte] * largest.repeat_interleave(256)[: len(centred)] + offset
            state |= {"nested_blocksize": 256, "nested_dtype": "float32"}
            state["nested_offset"] = float(offset)
            parts["weight.absmax"] = byte.to(torch.uint8)
            parts["weight.nested_absmax"] = largest
            parts["weight.nested_quant_map"] = nested_table
        else:
            parts["weight.absmax"] = absmax
        scale = absmax.repeat_interleave(64)[: len(flat)]
        codes = (flat[:, None] / scale[:, None] - table).abs().argmin(1)
        pairs = codes.view(-1, 2)
        parts["weight"] = (pairs[:, 0] * 16 + pairs[:, 1]).to(torch.uint8)[:, None]
        text = json.dumps(state).encode()
        parts[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(
            list(text), dtype=torch.uint8
        )
        return parts, (table[codes] * scale).view(weight.shape)

    return code


def bnb8(weight: Tensor) -> Coded:
    """bitsandbytes in 8 bits."""
    largest = weight.abs().amax(1)
    codes = (weight * (127 / largest[:, None])).round().to(torch.int8)
    parts = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, codes.float() * largest[:, None] / 127


def gptq(
    bits: int, *, symmetric: bool, act_order: bool = False, version: int = 1, has_index: bool = True
) -> Callable[[Tensor], Coded]:
    """GPTQ's packing."""

    def code(weight: Tensor) -> Coded:
        num_in = weight.shape[1]
        generator = torch.Generator().manual_seed(num_in)
        order = torch.randperm(num_in, generator=generator) if act_order else torch.arange(num_in)
        codes, scales, zeros = grid(weight[:, order], bits, GROUP, symmetric=symmetric)
        scales = scales.half().float()
        whole, places = torch.empty_like(weight), torch.empty_like(codes)
        whole[:, order] = ungrid(codes, scales, zeros)
        places[:, order] = codes
        index = torch.empty(num_in, dtype=torch.int32)
        index[order] = torch.arange(num_in, dtype=torch.int32) // GROUP
        stored = (zeros - (1 if version == 1 else 0)) % 2**bits
        parts = {
            "qweight": words(
                places.T.reshape(-1, 32 // bits, len(weight)).transpose(1, 2), bits
            ).reshape(-1, len(weight)),
            "qzeros": words(stored.T.contiguous(), bits),
            "scales": scales.T.half(),
        }
        if has_index:
            parts["g_idx"] = index
        return parts, whole

    return code


def awq(weight: Tensor) -> Coded:
    """AutoAWQ's packing, version gemm."""
    codes, scales, zeros = grid(weight, 4, GROUP, symmetric=False)
    scales = scales.half().float()

    def packed(values: Tensor) -> Tensor:
        rows = values.reshape(len(values), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return words(rows.reshape(len(values), -1), 4)

    parts = {"qweight": packed(codes.T), "qzeros": packed(zeros.T), "scales": scales.T.half()}
    return parts, ungrid(codes, scales, zeros)


def compressed(form: str) -> dict[str, Any]:
    """The settings of compressed-tensors."""
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {}}


_BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP}
FORMS: dict[str, Form] = {
    "fp8-channel": Form(fp8(per_tensor=False), compressed("float-quantized")),
    "fp8-tensor-static": Form(fp8(per_tensor=True), compressed("float-quantized")),
    "w8a8": Form(int8, compressed("int-quantized")),
    "w4a16-groups": Form(pack(4, symmetric=True), compressed("pack-quantized")),
    "w4a16-zeros": Form(pack(4, symmetric=False), compressed("pack-quantized")),
    "w4a16-channel": Form(pack(4, symmetric=True, group=0), compressed("pack-quantized")),
    "w8a16-zeros": Form(pack(8, symmetric=False), compressed("pack-quantized")),
    "nf4": Form(bnb4("nf4", nested=False), _BNB),
    "nf4-nested": Form(bnb4("nf4", nested=True), _BNB),
    "fp4": Form(bnb4("fp4", nested=False), _BNB),
    "nf4-dynamic": Form(
        bnb4("nf4", nested=True),
        _BNB,
        covers_vision=True,
        skips=("layers.2.self_attn", "layers.1.cross_attn.o_proj", "transformer.layers.1.mlp.fc2"),
    ),
    "bnb-int8": Form(bnb8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "gptq": Form(gptq(4, symmetric=True), _GPTQ | {"sym": True}),
    "gptq-zeros": Form(gptq(4, symmetric=False), _GPTQ | {"sym": False}),
    "gptq-act-order": Form(
        gptq(4, symmetric=True, act_order=True), _GPTQ | {"sym": True, "desc_act": True}
    ),
    "gptq-8": Form(gptq(8, symmetric=False), _GPTQ | {"bits": 8}),
    "gptq-v2": Form(gptq(4, symmetric=False, version=2), _GPTQ | {"checkpoint_format": "gptq_v2"}),
    "auto-round": Form(
        gptq(4, symmetric=False, has_index=False),
        _GPTQ | {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"},
    ),
    "auto-round-8": Form(
        gptq(8, symmetric=False, version=2, has_index=False),
        _GPTQ | {"quant_method": "auto-round", "bits": 8, "packing_format": "auto_round"},
    ),
    "auto-round-one-layer": Form(
        gptq(4, symmetric=False, version=2, has_index=False),
        _GPTQ
        | {"quant_method": "auto-round", "packing_format": "auto_round:gptqmodel", "sym": True}
        | {"extra_config": {"model.language_model.layers.0.mlp.up_proj": {"sym": False}}},
    ),
    "awq": Form(awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}),
}
