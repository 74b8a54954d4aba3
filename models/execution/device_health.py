"""Whether a device can compute anything more after a step has failed on it.

An illegal access or a failed assertion in a kernel ends a process's use of a CUDA device: every
later call fails too, and only a new process gets on. Owns that question, asked after a failure.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..batch import DeviceLostError


def is_lost(device: torch.device) -> bool:
    """True if even waiting for what was asked of this device fails."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def raise_if_lost(devices: Iterable[torch.device], error: Exception) -> None:
    """Raise DeviceLostError, from the error of a step that failed on them, if one is lost."""
    if lost := [str(device) for device in devices if is_lost(device)]:
        raise DeviceLostError(f"{', '.join(lost)} can compute nothing more") from error
