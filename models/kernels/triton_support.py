"""What every launch of a Triton kernel of this project needs to know.

Owns where they run, the least sizes and the operands' type. Knows no kernel. Imports triton only
when asked for it.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

# tl.dot takes no fewer rows, columns or depth
MIN_DOT = 16
MIN_CAPABILITY = (8, 0)


def why_no_kernels(device: torch.device) -> str | None:
    """Why a CUDA device runs no kernels of this project, in a few words; None if it may."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None


def power_of_2(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


def operand_of(states: Tensor) -> object:
    """The type in which a kernel feeds its products: the tensor's, but float32 on a CPU.

    Triton's interpreter multiplies bfloat16 as the integers that it is stored in.
    """
    import triton.language as tl

    names = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    return tl.float32 if states.device.type == "cpu" else names[states.dtype]
