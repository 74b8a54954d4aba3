"""compressed-tensors: float-quantized, int-quantized and pack-quantized weights.

Owns their tensors' names and packing (github.com/vllm-project/compressed-tensors). The headers say
everything, so the configuration's groups are not read. Scales of activations are not used:
activations stay in the compute type, which is more exact.

    float-quantized  weight F8_E4M3 [out, in]           weight_scale [out, groups], [out, 1] or [1]
    int-quantized    weight I8 [out, in]                the same; weight_zero_point of that shape
    pack-quantized   weight_packed I32 [out, in*bits/32]  weight_scale; weight_shape I64 [2];
                     weight_zero_point I32 [out*bits/32, groups]; weight_g_idx [in]
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...decoder.coded.layout import Coding, Layout
from ...errors import ModelError
from .coded_tensor import CodedTensor, Module
from .safetensors_headers import StoredTensor

if TYPE_CHECKING:
    from ...decoder.coded.weight import CodedWeight

PACKED, WEIGHT, SCALE = "weight_packed", "weight", "weight_scale"
ZERO, SHAPE, GROUP_INDEX = "weight_zero_point", "weight_shape", "weight_g_idx"
# on any layer; activations' and caches' scales are not used
SUFFIXES = (
    *(PACKED, SCALE, ZERO, SHAPE, GROUP_INDEX, "input_scale", "input_zero_point"),
    *("output_scale", "output_zero_point", "k_scale", "v_scale"),
)
_CODINGS = {"F8_E4M3": Coding.FP8, "I8": Coding.INT8}


def is_mine(parts: Mapping[str, StoredTensor]) -> bool:
    """Whether a layer's tensors are of this format."""
    return SCALE in parts and (PACKED in parts or WEIGHT in parts)


def read(module: Module) -> CodedTensor:
    """The layer's weight. Raises ModelError, one line."""
    if PACKED in module.parts:
        return _packed(module)
    weight = module.parts[WEIGHT]
    if weight.dtype not in _CODINGS or len(weight.shape) != 2:
        raise module.error(f"a weight of type {weight.dtype} beside weight_scale is not served")
    shape = (weight.shape[0], weight.shape[1])
    layout = Layout(_CODINGS[weight.dtype], _group(module, shape), ZERO in module.parts)
    return module.coded(shape, layout, build, [WEIGHT, SCALE, ZERO])


def _packed(module: Module) -> CodedTensor:
    if SHAPE not in module.parts:
        raise module.error("weight_shape is missing")
    num_out, num_in = struct.unpack("<2q", module.content(SHAPE))
    rows, words = module.parts[PACKED].shape
    codings = {4: Coding.INT4, 8: Coding.INT8}
    bits = next((bits for bits in codings if words == -(-num_in * bits // 32)), None)
    if bits is None or rows != num_out:
        raise module.error("weights are served in 4 or 8 bits, and these are in another width")
    shape = (num_out, num_in)
    has_order = GROUP_INDEX in module.parts
    layout = Layout(codings[bits], _group(module, shape), ZERO in module.parts, has_order)
    return module.coded(shape, layout, build_packed, [PACKED, SCALE, ZERO, GROUP_INDEX])


def _group(module: Module, shape: tuple[int, int]) -> int | None:
    scale = module.parts[SCALE].shape
    if scale in ((), (1,), (1, 1), (shape[0],), (shape[0], 1)):
        return None
    if len(scale) != 2 or scale[0] != shape[0] or shape[1] % scale[1]:
        raise module.error(f"scales of the shape {list(scale)} are not served")
    return shape[1] // scale[1]


def build(tensor: CodedTensor, found: Mapping[str, Any]) -> CodedWeight:
    """The weight of one code an element."""
    import torch

    from ...decoder.coded.weight import CodedWeight

    codes = found[WEIGHT].contiguous()
    if tensor.layout.coding is Coding.FP8:
        codes = codes.view(torch.uint8)
        if bool(((codes & 127) == 127).any()):
            raise ModelError(f"{tensor.name} has NaN in FP8: download {tensor.file} again")
    scales = _rows(found[SCALE], tensor).float()
    zeros = _rows(found[ZERO], tensor).to(torch.int16) if ZERO in found else None
    return CodedWeight(tensor.layout.coding, codes, scales, zeros)


def build_packed(tensor: CodedTensor, found: Mapping[str, Any]) -> CodedWeight:
    """The weight of several codes a word; half the range is added to codes and zero points."""
    import torch

    from ...decoder.coded.weight import CodedWeight
    from .packing import nibble_pairs, ordered, unpack

    bits, (num_out, num_in) = tensor.layout.coding.bits, tensor.shape
    codes = unpack(found[PACKED], bits)[:, :num_in]
    zeros = None
    if ZERO in found:
        unpacked = unpack(found[ZERO].T.contiguous(), bits)[:, :num_out].T
        zeros = (unpacked.to(torch.int16) - (1 << (bits - 1))).contiguous()
    codes, order = ordered(codes, found.get(GROUP_INDEX), tensor)
    stored = nibble_pairs(codes) if bits == 4 else (codes.to(torch.int16) - 128).to(torch.int8)
    scales = _rows(found[SCALE], tensor).float()
    return CodedWeight(tensor.layout.coding, stored, scales, zeros, order=order)


def _rows(values: Any, tensor: CodedTensor) -> Any:
    """[out, groups] of scales or zero points that may be one for all channels."""
    num_out, num_groups = tensor.shape[0], tensor.layout.num_groups(tensor.shape[1])
    if values.numel() == 1:
        values = values.reshape(1, 1).expand(num_out, num_groups)
    return values.reshape(num_out, num_groups).contiguous()
