"""Where Triton kernels run, their least sizes and their operands' dtype.

Imports triton only inside functions.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch
from torch import Tensor

# tl.dot takes no fewer rows, columns or depth
MIN_DOT = 16


def why_no_kernels(device: torch.device) -> str | None:
    """Why a CUDA device cannot run this project's kernels, in a few words; None if it can."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    return why_too_old(device)


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """A CUDA device's compute capability; (0, 0) of any other device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def why_too_old(device: torch.device) -> str | None:
    """Why a CUDA device is too old for half-precision kernels; None if it is not."""
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0"


def power_of_2(number: int) -> int:
    """The least power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def operand_of(states: Tensor) -> object:
    """The dtype of a kernel's products: the tensor's, but float32 on a CPU.

    Triton's interpreter would multiply the stored integers of bfloat16 values.
    """
    import triton.language as tl

    names = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    return tl.float32 if states.device.type == "cpu" else names[states.dtype]
