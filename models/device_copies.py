"""Copies between the host and a device: up without waiting, down in one copy a step.

Owns both directions. Knows nothing of what is copied. A step waits for its device once, where it
fetches its tokens; whatever else reads a value back, or copies from memory that is not pinned,
would wait too (tests/models/execution/test_synchronizations.py counts them).
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
    """The values on a device, in numpy's type of them or `dtype`; on a CPU it may share memory.

    On a GPU they are there for whatever runs on the current stream after it.
    """
    return _to_device(torch.from_numpy(np.ascontiguousarray(values, dtype=dtype)), device)


def fetch(tensors: Sequence[Tensor]) -> list[NDArray[Any]]:
    """The values of tensors of one device, by one copy, for which it waits."""
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
    # torch keeps pinned memory for reuse, and gives it to nobody before the copy is done
    return host.pin_memory().to(device, non_blocking=True)


def _to_host(tensor: Tensor) -> NDArray[np.uint8]:
    array: NDArray[np.uint8] = tensor.cpu().numpy()
    return array
