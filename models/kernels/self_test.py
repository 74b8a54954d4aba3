"""Tries kernels of this project on the machine that will serve, before they are taken.

Owns the trial, its tolerance and the line in the log. Knows nothing of what a kernel computes;
attention has a trial of its own (attention/trial.py), whose answer decides more.

A kernel depends on the driver, the GPU, triton's build and a C compiler for its launchers, none of
which a test of this project's can promise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from .triton_support import why_no_kernels

logger = logging.getLogger(__name__)

# of 1 and of what is right: both sides may compute in half precision
TOLERANCE = 3e-2

# pairs of what a kernel gave and what it should have given
Trial = Callable[[], list[tuple[Tensor, Tensor]]]


def are_usable(what: str, device: torch.device, trial: Trial) -> bool:
    """Whether Triton kernels can be had on a device and a trial of them is right.

    what: the kernels, in words for the log, which tells why a GPU does without them.
    """
    if device.type != "cuda":
        return False
    if (reason := why_no_kernels(device) or what_is_wrong(trial)) is None:
        return True
    logger.warning("%s are left to torch's operations: %s", what, reason)
    return False


@torch.inference_mode()
def what_is_wrong(trial: Trial) -> str | None:
    """What a trial showed to be wrong, in a few words; None if it is right."""
    try:
        error = max(_largest_error(*pair) for pair in trial())
    except Exception as failure:  # triton, its compilers and CUDA raise what they like
        line = " ".join(str(failure).split())[:200]
        return f"a trial of them failed: {type(failure).__name__}: {line}"
    if not error <= TOLERANCE:  # NaN is wrong too
        return f"a trial of them was off by {error:.3g}"
    return None


def _largest_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.float(), expected.float()
    return ((actual - expected).abs() / (1 + expected.abs())).max().item()
