"""Marks in time: on the device's own time line where there is one, else on the host's."""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    """Marks on the device's own time line where there is one, else on the host's."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"

    def mark(self) -> Any:
        """A point in time, behind all that the device was told so far."""
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Return when the device has done all that it was told."""
        if self._is_cuda:
            torch.cuda.synchronize()

    def ms(self, begin: Any, end: Any) -> float:
        """Milliseconds between two marks, after `wait`."""
        if not self._is_cuda:
            return 1e3 * float(end - begin)
        return float(begin.elapsed_time(end))
