"""Rounds a weight to int8 by output channel.

    weight[out, in] ~ codes[out, in] * scales[out],  codes in [-127, 127]

Symmetric, to nearest, without calibration: a row's largest weight keeps its size. The scale is
rounded to the compute dtype before the codes are computed, so its rounding adds no error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 127
# elements to convert at once: 64 MiB in float32
CHUNK_ELEMENTS = 1 << 24


@dataclass(slots=True, frozen=True)
class Int8Weight:
    """codes: int8 [out, in]; scales: [out] in the compute dtype."""

    codes: Tensor
    scales: Tensor


def quantize(weight: Tensor, dtype: torch.dtype) -> Int8Weight:
    """The nearest int8 weight, on the weight's device; scales in `dtype`.

    weight: floating [out, in]; converted some rows at a time, without a full float32 copy. Raises
    ValueError for a weight with NaN or infinity.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), dtype=dtype, device=weight.device)
    for rows in _row_chunks(weight):
        part = weight[rows].float()
        largest = part.abs().amax(1)
        if not bool(torch.isfinite(largest).all()):
            raise ValueError("the weight has NaN or infinite values")
        scale = (largest / LARGEST).to(dtype)
        scales[rows] = scale
        # a row of zeros may have any scale
        divisor = torch.where(scale > 0, scale, 1).float()
        codes[rows] = (part / divisor[:, None]).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    return Int8Weight(codes, scales)


def _row_chunks(weight: Tensor) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
    return [slice(start, start + size) for start in range(0, len(weight), size)]
