"""Recognizes how a checkpoint's weights are stored, from its headers.

Owns the decision: headers count, the configuration's key only says which of two packings they are.
Raises for forms that are not served, each with one line. Needs no torch.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...checkpoint import MERGE_REMEDY, check_config, read_json
from ...errors import ModelError
from . import bitsandbytes, compressed_tensors, gptq
from .coded_tensor import Module
from .safetensors_headers import StoredTensor, read_tensors

logger = logging.getLogger(__name__)

PLAIN_TYPES = frozenset({"F64", "F32", "F16", "BF16"})
# the longest first: a weight's statistics begin with its own name
_SUFFIXES = sorted(
    {*compressed_tensors.SUFFIXES, *bitsandbytes.SUFFIXES, *gptq.SUFFIXES, "weight"},
    key=len,
    reverse=True,
)
SERVED = ("compressed-tensors", "bitsandbytes", "gptq", "auto-round", "awq")
_ALIASES = {"intel/auto-round": "auto-round"}
REMEDY = (
    "use the 16-bit checkpoint, with --quantize int8 or fp8 if memory is short, or a form of "
    f"{', '.join(SERVED)}"
)
# formats of compressed-tensors with other tensors than those that are served
_SERVED_FORMATS = frozenset(
    {
        *("dense", "float-quantized", "int-quantized", "naive-quantized", "pack-quantized"),
        "mixed-precision",
    }
)
_AWQ_VERSIONS = frozenset({"gemm"})
_GPTQ_FORMATS = frozenset({"gptq", "gptq_v2"})
_AUTO_ROUND_FORMATS = frozenset(
    {
        *("auto", "auto_round", "auto_round:gptq", "auto_round:auto_gptq", "auto_round:gptqmodel"),
        *("auto_round:awq", "auto_round:auto_awq", "auto_round:fp8", "auto_round:fp8_static"),
    }
)
_KEYS = ("quantization_config", "compression_config")


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization's settings in config.json, at its top or in a part; None without any."""
    for part in (config, config.get("text_config"), config.get("vision_config")):
        for key in _KEYS:
            if isinstance(part, Mapping) and isinstance(part.get(key), dict) and part[key]:
                return dict(part[key])
    if isinstance(config.get("quantization"), dict) and config["quantization"]:
        return {"quant_method": "mlx"}
    return None


def method_of(settings: Mapping[str, Any]) -> str:
    """The method's name, as `SERVED` has it if it is served."""
    method = str(settings.get("quant_method") or "a method without a name").lower()
    if settings.get("quant_method") is None and (
        settings.get("load_in_4bit") or settings.get("load_in_8bit")
    ):
        method = "bitsandbytes"
    return _ALIASES.get(method, method)


def check_method(settings: Mapping[str, Any], source: str) -> None:
    """Raise ModelError for a method, format or version that is not served, naming it."""
    method = method_of(settings)
    what = f"{source}: the checkpoint is quantized with {method}"
    if method not in SERVED:
        raise ModelError(f"{what}, which is not served; {REMEDY}")
    if settings.get("is_marlin_format"):
        raise ModelError(f"{what} and packed for Marlin, which is not served; {REMEDY}")
    if settings.get("transform_config"):  # its rotations of activations are not in the weights
        raise ModelError(f"{what} with a transform_config, which is not served; {REMEDY}")
    formats: dict[str, tuple[str, frozenset[str]]] = {
        "compressed-tensors": ("format", _SERVED_FORMATS),
        "awq": ("version", _AWQ_VERSIONS),
        "gptq": ("checkpoint_format", _GPTQ_FORMATS),
        "auto-round": ("packing_format", _AUTO_ROUND_FORMATS),
    }
    key, served = formats.get(method, ("", frozenset()))
    found = settings.get(key)
    if key and found is not None and str(found).lower() not in served:
        wanted = ", ".join(sorted(served))
        raise ModelError(f"{what}, {key} {found}, which is not served (served: {wanted}); {REMEDY}")
    bits = settings.get("bits") or settings.get("w_bit")
    if method in ("gptq", "auto-round", "awq") and bits is not None and bits not in (4, 8):
        raise ModelError(f"{what} in {bits} bits; served are 4 and 8 bits; {REMEDY}")


def check_hub_config(config: dict[str, Any], source: str) -> None:
    """Raise ModelError for a config.json whose weights are not worth a download.

    A key of bitsandbytes may be stale, and its form is served anyway.
    """
    check_config(config, source)
    if (settings := quantization_of(config)) is not None:
        check_method(settings, source)


def read_weights(folder: Path) -> dict[str, StoredTensor]:
    """A checkpoint's weights by their names in the module, from config.json and headers.

    Raises ModelError, one line, for damaged files and for a form that is not served.
    """
    return logical_tensors(folder, read_json(folder / "config.json"), read_tensors(folder))


def logical_tensors(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The weights by their names in the module, a coded weight's tensors as one `CodedTensor`.

    Raises ModelError, one line, for a form that is not served.
    """
    _check_merged(folder, tensors)
    settings = quantization_of(config)
    odd = [one for one in tensors.values() if one.dtype and one.dtype not in PLAIN_TYPES]
    modules = _modules(folder, tensors)
    coded = {name: module for name, module in modules.items() if _reader(module) is not None}
    if not odd and not coded:
        if settings is not None:
            logger.info(
                "%s: weights are in 16 or 32 bits: quantization_config (%s) is ignored",
                folder,
                method_of(settings),
            )
        return dict(tensors)
    if settings is not None:
        check_method(settings, str(folder))
    if not coded:
        raise ModelError(
            f"{folder}: {odd[0].name} is stored as {odd[0].dtype} without scales that are known; "
            f"{REMEDY}"
        )
    return _with_coded(tensors, coded, settings)


def _check_merged(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise ModelError for weights beside an adapter's: both would have to be added."""
    marks = (".lora_A.", ".lora_B.", ".lora_embedding_A.", ".base_layer.", ".modules_to_save.")
    found = next((name for name in tensors if any(mark in name for mark in marks)), None)
    if found is not None:
        raise ModelError(
            f"{folder}: the weights have a LoRA adapter that is not merged ({found}); "
            f"{MERGE_REMEDY}"
        )


def _with_coded(
    tensors: Mapping[str, StoredTensor],
    coded: Mapping[str, Module],
    settings: Mapping[str, Any] | None,
) -> dict[str, StoredTensor]:
    used = {part.name for module in coded.values() for part in module.parts.values()}
    found = {name: tensor for name, tensor in tensors.items() if name not in used}
    for module in coded.values():
        if gptq.is_mine(module.parts):
            if settings is None:
                raise module.error("config.json does not say how its qweight is packed")
            tensor = gptq.read(module, settings)
        else:
            reader: Any = _reader(module)
            tensor = reader(module)
        found[tensor.name] = tensor
        bias = module.parts.get("bias")
        if bias is not None:
            found[bias.name] = bias
    return found


def _reader(module: Module) -> Any | None:
    for form in (compressed_tensors, bitsandbytes, gptq):
        if form.is_mine(module.parts):
            return form.read
    return None


def _modules(folder: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, Module]:
    """The layers that have a tensor with a suffix of a format, with those tensors."""
    parts: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        suffix = next((one for one in _SUFFIXES if name.endswith(f".{one}")), None)
        if suffix is not None:
            parts[name.removesuffix(f".{suffix}")][suffix] = tensor
    return {name: Module(folder, name, found) for name, found in parts.items()}
