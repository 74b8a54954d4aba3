"""Copies between the host and a device: uploads without waiting, one download a step.

A step waits for its device once, when it fetches its tokens. Any other read of a device's value,
and any copy from memory that is not pinned, would wait too
(tests/models/execution/test_synchronizations.py counts the waits).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike, NDArray
from torch import Tensor

_NUMPY_TYPES = {torch.int64: np.int64, torch.float32: np.float32}


def upload(values: ArrayLike, device: torch.device, dtype: DTypeLike | None = None) -> Tensor:
    """The values on a device, in their numpy dtype or `dtype`; on a CPU it may share memory.

    On a GPU, work queued later on the current stream sees them.
    """
    return _to_device(torch.from_numpy(np.ascontiguousarray(values, dtype=dtype)), device)


def fetch(tensors: Sequence[Tensor]) -> list[NDArray[Any]]:
    """The values of tensors on one device, by one copy; waits for it."""
    flat = torch.cat([_bytes_of(tensor) for tensor in tensors])
    packed, arrays, start = _to_host(flat), [], 0
    for tensor in tensors:
        end = start + tensor.numel() * tensor.element_size()
        dtype = _NUMPY_TYPES[tensor.dtype]
        arrays.append(packed[start:end].view(dtype).reshape(tensor.shape))
        start = end
    return arrays


def _bytes_of(tensor: Tensor) -> Tensor:
    if not tensor.numel():
        return tensor.new_empty(0, dtype=torch.uint8)
    return tensor.contiguous().view(-1).view(torch.uint8)


def _to_device(host: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return host.to(device)
    # torch reuses the pinned memory only after the copy is done
    return host.pin_memory().to(device, non_blocking=True)


def _to_host(tensor: Tensor) -> NDArray[np.uint8]:
    array: NDArray[np.uint8] = tensor.cpu().numpy()
    return array
