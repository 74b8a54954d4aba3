"""Checks after a failed step whether the device still works.

After an illegal access or a failed assertion in a kernel, every later call of this process to the
CUDA device fails; only a new process can use it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..batch import DeviceLostError


def is_lost(device: torch.device) -> bool:
    """True if synchronizing with the device fails."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def raise_if_lost(devices: Iterable[torch.device], error: Exception) -> None:
    """Raise DeviceLostError if a device is lost. error: of the step that failed on them."""
    if lost := [str(device) for device in devices if is_lost(device)]:
        raise DeviceLostError(f"{', '.join(lost)} cannot compute any more") from error
