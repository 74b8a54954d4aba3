"""Copies between the host and a device, and times on it: no wait but for one download a step.

A step waits for its device once, for the copy of its tokens (`Download`). Any other read of a
device's value, and any copy from memory that is not pinned, would wait too
(tests/models/execution/test_synchronizations.py counts the waits).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike, NDArray
from torch import Tensor

# bytes
ALIGNMENT = 128
_NUMPY_TYPES = {torch.int64: np.int64, torch.float32: np.float32}


class Stopwatch:
    """The time of some work on a device, without waiting for it: by events on a GPU's stream."""

    def __init__(self, device: torch.device) -> None:
        """Start."""
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._start: Any = self._mark()
        self._end: Any = None

    def stop(self) -> None:
        """The work is queued."""
        self._end = self._mark()

    @property
    def seconds(self) -> float | None:
        """The time between start and stop; None while the device is not done."""
        start, end = self._start, self._end
        if self._stream is None:
            return float(end - start)
        return float(start.elapsed_time(end)) / 1e3 if end.query() else None

    def _mark(self) -> Any:
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event


class WorkTimes:
    """The times of work on a device, each counted once when the device is done with it.

    A step that fetches tokens has waited for its images. The images of a step without tokens count
    in the next step that has some.
    """

    def __init__(self) -> None:
        self._watches: list[Stopwatch] = []

    def add(self, watch: Stopwatch) -> None:
        """Count a stopped watch."""
        self._watches.append(watch)

    def take(self) -> float:
        """The seconds of the work that is done by now and was not counted before."""
        taken = [(watch, watch.seconds) for watch in self._watches]
        self._watches = [watch for watch, seconds in taken if seconds is None]
        return sum(seconds for _, seconds in taken if seconds is not None)


def upload(values: ArrayLike, device: torch.device, dtype: DTypeLike | None = None) -> Tensor:
    """The values on a device, in their numpy dtype or `dtype`; on a CPU it may share memory.

    On a GPU, work queued later on the current stream sees them.
    """
    return _to_device(torch.from_numpy(np.ascontiguousarray(values, dtype=dtype)), device)


def upload_together(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """The arrays on a device, each in its dtype, by one copy; each begins at 128 bytes.

    See `upload`. Kernels are compiled for pointers at multiples of 16 bytes.
    """
    if device.type == "cpu":
        return [upload(array, device) for array in arrays]
    contiguous = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    starts = np.cumsum([0, *(-(-one.nbytes // ALIGNMENT) * ALIGNMENT for one in contiguous)])
    packed = np.zeros(starts[-1], dtype=np.uint8)
    for one, start in zip(contiguous, starts, strict=False):
        packed[start : start + one.nbytes] = one.numpy().reshape(-1).view(np.uint8)
    on_device = upload(packed, device)
    return [
        on_device[start : start + one.nbytes].view(one.dtype).view(one.shape)
        for one, start in zip(contiguous, starts, strict=False)
    ]


class Download:
    """Values of tensors on one device on their way to the host, by one copy.

    `wait` waits for this copy alone, not for work that was queued after it.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Queue the copy."""
        parts = [_bytes_of(tensor) for tensor in tensors]
        flat = parts[0] if len(parts) == 1 else torch.cat(parts)
        self._tensors = tensors
        self._packed, self._copied = _to_host(flat)

    @property
    def is_done(self) -> bool:
        """Whether `wait` returns at once."""
        return self._copied is None or bool(self._copied.query())

    def wait(self) -> list[NDArray[Any]]:
        """The values, in the tensors' shapes."""
        if self._copied is not None:
            self._copied.synchronize()
        arrays, start = [], 0
        for tensor in self._tensors:
            end = start + tensor.numel() * tensor.element_size()
            dtype = _NUMPY_TYPES[tensor.dtype]
            arrays.append(self._packed[start:end].view(dtype).reshape(tensor.shape))
            start = end
        return arrays


def fetch(tensors: Sequence[Tensor]) -> list[NDArray[Any]]:
    """The values of tensors on one device, by one copy; waits for it."""
    return Download(tensors).wait()


def _bytes_of(tensor: Tensor) -> Tensor:
    if not tensor.numel():
        return tensor.new_empty(0, dtype=torch.uint8)
    return tensor.contiguous().view(-1).view(torch.uint8)


def _to_device(host: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return host.to(device)
    # torch reuses the pinned memory only after the copy is done
    return host.pin_memory().to(device, non_blocking=True)


def _to_host(tensor: Tensor) -> tuple[NDArray[np.uint8], Any]:
    """Memory that will have the values, and the event after which it has them; None: it has."""
    if not tensor.is_cuda:
        return tensor.cpu().numpy(), None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensor.device))
    return host.numpy(), copied
