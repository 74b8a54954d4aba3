"""Whether a device can compute anything more after a step has failed on it.

An illegal access or a failed assertion in a kernel ends a process's use of a CUDA device: every
later call fails too, and only a new process gets on. Owns that question, asked after a failure.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch

from .batch import DeviceLostError


class _OnDevices(Protocol):
    @property
    def devices(self) -> Iterable[torch.device]: ...


Owner = TypeVar("Owner", bound=_OnDevices)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def is_lost(device: torch.device) -> bool:
    """True if even waiting for what was asked of this device fails."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def tells_of_lost_devices(
    step: Callable[Concatenate[Owner, Arguments], Result],
) -> Callable[Concatenate[Owner, Arguments], Result]:
    """The method, which raises DeviceLostError where it fails and leaves a lost device behind."""

    @functools.wraps(step)
    def told(self: Owner, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return step(self, *args, **kwargs)
        except Exception as error:
            if lost := [str(device) for device in self.devices if is_lost(device)]:
                raise DeviceLostError(f"{', '.join(lost)} can compute nothing more") from error
            raise

    return told
