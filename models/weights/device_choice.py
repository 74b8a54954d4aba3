"""The device and the dtype in which a model computes, from their options and the machine."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from ..errors import ModelError
from .meta_model import one_line

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# the driver's file of the first GPU
GPU_FILE = Path("/dev/nvidia0")


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU, else the CPU. Raises ModelError.

    A GPU that torch cannot use is an error with torch's reason, not a slow server on the CPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and GPU_FILE.exists():
            _refuse_unusable_gpu()
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"device {name!r} is unknown: use auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    index = device.index or 0
    if index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ModelError(f"device {name!r} does not exist ({count} CUDA devices): use --device cpu")
    return torch.device("cuda", index)


def _refuse_unusable_gpu() -> None:
    """Raise ModelError with the reason why torch cannot use the GPU; a CPU build only logs it."""
    if torch.version.cuda is None:
        logger.warning("a GPU is here, but this torch is a build for CPUs: serving on the CPU")
        return
    try:
        torch.cuda.init()
        reason = "it found no device"
    except Exception as error:  # RuntimeError, AssertionError and others
        reason = one_line(error)
    raise ModelError(
        f"a GPU is here, but torch for CUDA {torch.version.cuda} cannot use it: {reason}; update "
        "the driver, or use --device cpu"
    )


def check_gpus(first: torch.device, count: int, asked: str) -> None:
    """Raise ModelError if a chosen GPU and those after it are fewer than `count`.

    asked: the options that need them, for the message.
    """
    if first.type != "cuda":
        return
    left = torch.cuda.device_count() - (first.index or 0)
    if left < count:
        raise ModelError(f"{asked} needs {count} CUDA devices; only {left} exist from {first} on")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name.

    "auto" is bfloat16 if the hardware multiplies it; else float16 on a GPU from compute capability
    7.0 on, which has products of it, and float32 elsewhere.
    """
    if name == "auto" and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 0):
            return torch.bfloat16
        return torch.float16 if capability >= (7, 0) else torch.float32
    if name == "auto":
        return torch.bfloat16 if cpu_has_bfloat16() else torch.float32
    if name not in _DTYPES:
        raise ModelError(f"dtype {name!r} is unknown: use auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware; torch may remove these private probes."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, lambda: False)()) for probe in probes)
