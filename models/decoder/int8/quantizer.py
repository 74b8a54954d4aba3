"""Rounds a weight to int8 by output channel, and back.

Owns the rounding. Knows nothing of layers or of products.

    weight[out, in] ~ codes[out, in] * scales[out],  codes in [-127, 127]

Symmetric, nearest, no calibration: a row's largest weight keeps its size. The scale is rounded to
the compute dtype first and codes are made with the rounded one, so that its rounding costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 127
# of a weight that is converted at once: 64 MiB in float32
CHUNK_ELEMENTS = 1 << 24


@dataclass(slots=True, frozen=True)
class Int8Weight:
    """codes: int8 [out, in]; scales: [out] in the compute dtype."""

    codes: Tensor
    scales: Tensor


def quantize(weight: Tensor, dtype: torch.dtype) -> Int8Weight:
    """The nearest int8 weight, on the weight's device; scales in `dtype`.

    weight: floating [out, in]. Works some rows at a time: no full-size copy in float32 is made.
    Raises ValueError for a weight with NaN or infinity, which no scale could hold.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), dtype=dtype, device=weight.device)
    for rows in _row_chunks(weight):
        part = weight[rows].float()
        largest = part.abs().amax(1)
        if not bool(torch.isfinite(largest).all()):
            raise ValueError("the weight holds NaN or infinity")
        scale = (largest / LARGEST).to(dtype)
        scales[rows] = scale
        # a row of zeros has no scale; one is as good as another
        divisor = torch.where(scale > 0, scale, 1).float()
        codes[rows] = (part / divisor[:, None]).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    return Int8Weight(codes, scales)


def dequantize(weight: Int8Weight) -> Tensor:
    """The weight in the dtype of its scales, [out, in]."""
    return weight.codes.to(weight.scales.dtype) * weight.scales[:, None]


def _row_chunks(weight: Tensor) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
    return [slice(start, start + size) for start in range(0, len(weight), size)]
