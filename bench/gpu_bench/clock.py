"""Marks in time: on the device's time line if there is a device, else on the host's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch


class Clock:
    """Takes marks in the order of the device's work."""

    def __init__(self, device: str) -> None:
        self._is_cuda = device == "cuda"

    def mark(self) -> Any:
        """A point in time, after all work that the device has got so far."""
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Return when the device has finished its work."""
        if self._is_cuda:
            torch.cuda.synchronize()

    def ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two marks, after `wait`."""
        return float(start.elapsed_time(end) if self._is_cuda else 1e3 * (end - start))

    def median_ms(self, pairs: Sequence[tuple[Any, Any]]) -> float:
        """The median of several times, after `wait`."""
        return statistics.median(self.ms(*pair) for pair in pairs)
