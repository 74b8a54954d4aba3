"""Tries kernels on the machine that will run them, before they are used.

A kernel depends on the driver, the GPU, triton's build and a C compiler for its launchers, which no
test of this project can guarantee.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from .triton_support import why_no_kernels

logger = logging.getLogger(__name__)

# Absolute and relative, against results in float32: a sum in bfloat16 may be off by two units of
# its last place, 3.1e-2 of an output of order 1.
TOLERANCE = 6e-2

# runs a kernel; pairs of actual and expected results
Trial = Callable[[], list[tuple[Tensor, Tensor]]]


def are_usable(what: str, device: torch.device, trial: Trial) -> bool:
    """Whether Triton kernels run on a device and their trial is right.

    what: the kernels, for the log line that gives the reason if a GPU cannot use them.
    """
    if device.type != "cuda":
        return False
    if (reason := why_no_kernels(device) or what_is_wrong(trial)) is None:
        return True
    logger.warning("%s use torch's operations: %s", what, reason)
    return False


@torch.inference_mode()
def what_is_wrong(trial: Trial) -> str | None:
    """What was wrong in a trial, in a few words; None if it is right."""
    try:
        errors = [_largest_error(*pair) for pair in trial()]
    except Exception as failure:  # triton, its compilers and CUDA raise any type
        line = " ".join(str(failure).split())[:200]
        return f"the trial failed: {type(failure).__name__}: {line}"
    # NaN is wrong too
    wrong = next((error for error in errors if not error <= TOLERANCE), None)
    return None if wrong is None else f"the trial was off by {wrong:.3g}"


def _largest_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.float(), expected.float()
    return ((actual - expected).abs() / (1 + expected.abs())).max().item()
