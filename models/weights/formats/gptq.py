"""GPTQ packing, as gptq and auto-round write it, and AWQ's.

Owns their tensors' names and packing (AutoGPTQ, GPTQModel, AutoAWQ).

    gptq  qweight I32 [in*bits/32, out], codes along inputs; qzeros I32 [groups, out*bits/32], zero
          points along outputs, less 1 in version 1; scales [groups, out]; g_idx I32 [in].
          auto-round names the second version auto_round or auto_round:gptqmodel
    awq   qweight I32 [in, out/8], qzeros I32 [groups, out/8], both along outputs in the order
          0 2 4 6 1 3 5 7; scales [groups, out]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...decoder.coded.layout import Coding, Layout
from .coded_tensor import CodedTensor, Module
from .safetensors_headers import StoredTensor

if TYPE_CHECKING:
    from ...decoder.coded.weight import CodedWeight

QWEIGHT, QZEROS, SCALES, GROUP_INDEX = "qweight", "qzeros", "scales", "g_idx"
SUFFIXES = (QWEIGHT, QZEROS, SCALES, GROUP_INDEX)
GPTQ, AWQ = "gptq", "awq"
# AutoAWQ's place of each code of a word
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_CODINGS = {4: Coding.INT4, 8: Coding.INT8}
# auto-round's names for packings with zero points as they are
_SECOND_VERSION = ("auto_round", "auto_round:gptqmodel")
# where auto-round and GPTQModel keep settings of single layers
_OF_LAYERS = ("extra_config", "dynamic")


def is_mine(parts: Mapping[str, StoredTensor]) -> bool:
    """Whether a layer's tensors are of this format."""
    return QWEIGHT in parts and SCALES in parts


def read(module: Module, config: Mapping[str, Any]) -> CodedTensor:
    """The layer's weight. config: the checkpoint's quantization_config. Raises ModelError."""
    if len(module.parts[SCALES].shape) != 2 or len(module.parts[QWEIGHT].shape) != 2:
        raise module.error("its scales or qweight are no matrix")
    num_groups, num_out = module.parts[SCALES].shape
    bits = _bits(module, config, num_out)
    rows, columns = module.parts[QWEIGHT].shape
    packing = packing_of(config)
    num_in = rows if packing == AWQ else rows * 32 // bits
    if (columns * 32 // bits if packing == AWQ else columns) != num_out:
        raise module.error(
            f"its qweight {[rows, columns]} is not packed as {packing} packs {bits} bits"
        )
    if num_in % num_groups:
        raise module.error(f"its {num_in} inputs have {num_groups} groups")
    is_symmetric = packing == GPTQ and _are_all_symmetric(config)
    if not is_symmetric and QZEROS not in module.parts:
        raise module.error("its qzeros are missing")
    has_order = GROUP_INDEX in module.parts and bool(config.get("desc_act", False))
    group = None if num_groups == 1 else num_in // num_groups
    return module.coded(
        (num_out, num_in),
        Layout(_CODINGS[bits], group, not is_symmetric, has_order),
        build_awq if packing == AWQ else build,
        [QWEIGHT, SCALES, *([] if is_symmetric else [QZEROS]), *([GROUP_INDEX] * has_order)],
        zero_offset=_zero_offset(config),
    )


def _bits(module: Module, config: Mapping[str, Any], num_out: int) -> int:
    bits = config.get("bits") or config.get("w_bit")
    if QZEROS in module.parts:  # layers may have other widths than the configuration's
        bits = module.parts[QZEROS].shape[-1] * 32 // num_out
    if bits not in _CODINGS or (bits == 8 and packing_of(config) == AWQ):
        raise module.error(f"{bits} bits are not served: weights have 4 or 8 bits, of AWQ 4")
    return int(bits)


def packing_of(config: Mapping[str, Any]) -> str:
    """Whose packing: AWQ's or GPTQ's."""
    words = f"{config.get('quant_method')} {config.get('packing_format')} {config.get('backend')}"
    return AWQ if "awq" in words else GPTQ


def _zero_offset(config: Mapping[str, Any]) -> int:
    """What is added to a stored zero point: 1 in version 1 of GPTQ's format."""
    is_second = config.get("checkpoint_format") == "gptq_v2"
    return 0 if is_second or config.get("packing_format") in _SECOND_VERSION else 1


def _are_all_symmetric(config: Mapping[str, Any]) -> bool:
    """Whether every layer has its zero points in the middle, so that they need not be read."""
    groups = [config.get(key) for key in _OF_LAYERS]
    layers = [one for group in groups if isinstance(group, dict) for one in group.values()]
    found = [one.get("sym", True) for one in layers if isinstance(one, dict)]
    return all([config.get("sym", False), *found])


def build(tensor: CodedTensor, found: Mapping[str, Any]) -> CodedWeight:
    """The weight of GPTQ's packing."""
    from .packing import unpack

    bits = tensor.layout.coding.bits
    codes = unpack(found[QWEIGHT].T, bits)
    zeros = None
    if QZEROS in found:
        # a zero point of 0 was stored as the largest code
        stored = unpack(found[QZEROS], bits).short() + tensor.facts["zero_offset"]
        zeros = stored & ((1 << bits) - 1)
    return _weight(tensor, codes, zeros, found)


def build_awq(tensor: CodedTensor, found: Mapping[str, Any]) -> CodedWeight:
    """The weight of AWQ's packing."""
    import torch

    from .packing import unpack

    places = torch.argsort(torch.tensor(_AWQ_ORDER))

    def columns(words: Any) -> Any:
        codes = unpack(words, 4)
        return codes.view(len(codes), -1, len(_AWQ_ORDER))[..., places].reshape(len(codes), -1)

    return _weight(tensor, columns(found[QWEIGHT]).T, columns(found[QZEROS]).short(), found)


def _weight(
    tensor: CodedTensor, codes: Any, zeros: Any | None, found: Mapping[str, Any]
) -> CodedWeight:
    """codes: [out, in] from 0; zeros: [groups, out] from 0, None for the middle of the range."""
    import torch

    from ...decoder.coded.weight import CodedWeight
    from .packing import nibble_pairs, ordered

    bits = tensor.layout.coding.bits
    middle = 1 << (bits - 1)
    codes, order = ordered(codes, found.get(GROUP_INDEX), tensor)
    codes = nibble_pairs(codes) if bits == 4 else (codes.short() - middle).to(torch.int8)
    scales = found[SCALES].float().T.contiguous()
    relative = None if zeros is None else (zeros - middle).T.contiguous()
    return CodedWeight(tensor.layout.coding, codes.contiguous(), scales, relative, order=order)
