"""bitsandbytes: saved 4-bit (NF4, FP4, with nested statistics) and 8-bit weights.

Owns their tensors' names and packing (github.com/bitsandbytes-foundation/bitsandbytes). The package
itself is not needed.

    4 bits  weight U8 [out*in/2, 1], the first code in the high nibble
            weight.absmax F32 [blocks], or U8 with weight.nested_absmax and weight.nested_quant_map
            weight.quant_map F32 [16]
            weight.quant_state.bitsandbytes__nf4 or __fp4: JSON with shape, blocksize, nested_offset
    8 bits  weight I8 [out, in], SCB F32 [out]: value = code * SCB / 127
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...decoder.coded.layout import Coding, Layout
from .coded_tensor import CodedTensor, Module
from .safetensors_headers import StoredTensor

if TYPE_CHECKING:
    from ...decoder.coded.weight import CodedWeight

WEIGHT, SCB, ABSMAX, TABLE = "weight", "SCB", "weight.absmax", "weight.quant_map"
NESTED_ABSMAX, NESTED_TABLE = "weight.nested_absmax", "weight.nested_quant_map"
STATE = "weight.quant_state.bitsandbytes__"
STATES = (f"{STATE}nf4", f"{STATE}fp4")
SUFFIXES = (SCB, "weight_format", ABSMAX, TABLE, NESTED_ABSMAX, NESTED_TABLE, *STATES)
_LARGEST = 127


def is_mine(parts: Mapping[str, StoredTensor]) -> bool:
    """Whether a layer's tensors are of this format."""
    return SCB in parts or any(name.startswith(STATE) for name in parts)


def read(module: Module) -> CodedTensor:
    """The layer's weight. Raises ModelError, one line."""
    if WEIGHT not in module.parts:
        raise module.error("its weight is missing")
    if SCB in module.parts:
        return _read_8bit(module)
    state_name = next((name for name in STATES if name in module.parts), None)
    if state_name is None or ABSMAX not in module.parts or TABLE not in module.parts:
        raise module.error("its quant_state, absmax or quant_map is missing")
    state = module.content_json(state_name)
    shape, block = state.get("shape"), state.get("blocksize")
    if not isinstance(shape, list) or len(shape) != 2 or not isinstance(block, int):
        raise module.error("its quant_state has no shape or blocksize")
    if shape[0] * shape[1] != 2 * module.parts[WEIGHT].num_elements:
        raise module.error("its quant_state does not fit its weight")
    if NESTED_ABSMAX in module.parts and not isinstance(state.get("nested_blocksize"), int):
        raise module.error("its quant_state has no nested_blocksize")
    return module.coded(
        (shape[0], shape[1]),
        # a block may reach into the next row: groups are then parts of blocks
        Layout(Coding.TABLE4, math.gcd(block, shape[1])),
        build,
        [WEIGHT, ABSMAX, TABLE, NESTED_ABSMAX, NESTED_TABLE],
        block=block,
        nested_block=state.get("nested_blocksize"),
        nested_offset=float(state.get("nested_offset") or 0.0),
    )


def _read_8bit(module: Module) -> CodedTensor:
    weight = module.parts[WEIGHT]
    if weight.dtype != "I8" or len(weight.shape) != 2:
        raise module.error(f"its weight beside SCB is of type {weight.dtype}, not I8")
    if "weight_format" in module.parts and any(module.content("weight_format")):
        raise module.error("its weight_format is not row: save it with a newer bitsandbytes")
    shape = (weight.shape[0], weight.shape[1])
    return module.coded(shape, Layout(Coding.INT8), build_8bit, [WEIGHT, SCB])


def build(tensor: CodedTensor, found: Mapping[str, Any]) -> CodedWeight:
    """The weight in 4 bits."""
    import torch

    from ...decoder.coded.weight import CodedWeight

    num_out, num_in = tensor.shape
    packed = found[WEIGHT].reshape(num_out, num_in // 2)
    scales = found[ABSMAX]
    if NESTED_ABSMAX in found:
        table = found[NESTED_TABLE].float()
        blocks = found[NESTED_ABSMAX].float().repeat_interleave(tensor.facts["nested_block"])
        scales = table[scales.long()] * blocks[: len(scales)] + tensor.facts["nested_offset"]
    num_groups = tensor.layout.num_groups(num_in)
    first = torch.arange(num_out * num_groups, device=scales.device) * (num_in // num_groups)
    scales = scales.float()[first // tensor.facts["block"]].reshape(num_out, num_groups)
    codes = ((packed & 15) << 4) | (packed >> 4)
    return CodedWeight(Coding.TABLE4, codes, scales, table=found[TABLE].float())


def build_8bit(tensor: CodedTensor, found: Mapping[str, Any]) -> CodedWeight:
    """The weight in 8 bits."""
    from ...decoder.coded.weight import CodedWeight

    scales = (found[SCB].float() / _LARGEST).reshape(-1, 1)
    return CodedWeight(Coding.INT8, found[WEIGHT].contiguous(), scales)
