"""Products of int8 weights and rows that are rounded to int8 too, one scale a row (W8A8, dynamic).

On a CPU with VNNI instructions oneDNN adds up four products of 8 bits at once: many rows take a
part of the time of bfloat16, and the weight is read in 8 bits. Sums are whole numbers, so a row has
the same bits whatever rows are beside it.

    row ~ codes * scale,  codes in [-127, 127],  scale = the row's largest magnitude / 127

oneDNN takes codes from 0 to 255, so 128 is added and its share subtracted from the sums. Without
VNNI instructions its sums of two products exceed 16 bits and are cut off: `is_exact` finds that.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from .quantizer import LARGEST, Int8Weight

logger = logging.getLogger(__name__)


class DynamicInt8Weight:
    """An int8 weight in oneDNN's order. Inference only."""

    __slots__ = ("_largest", "_num_out", "_packed", "_scales", "_zeros")

    def __init__(self, weight: Int8Weight, largest: int = LARGEST) -> None:
        """weight: it is copied. largest: code of a row; at most 63 is exact on every CPU."""
        self._num_out, self._largest = len(weight.codes), largest
        self._packed = torch.ops.onednn.qlinear_prepack(weight.codes.clone(), None)
        self._scales = weight.scales.float()
        self._zeros = torch.zeros(self._num_out, dtype=torch.int32)

    @property
    def nbytes(self) -> int:
        """Of the weight and its scales."""
        return int(self._packed.nbytes) + self._scales.nbytes + self._zeros.nbytes

    def product(self, states: Tensor) -> Tensor:
        """[..., in_features] in float32 or bfloat16 to [..., out_features]."""
        return self._sums(states).to(states.dtype)

    def product_plus(self, states: Tensor, addend: Tensor) -> Tensor:
        """The product plus an addend of its shape, rounded once."""
        return self._sums(states).add_(addend).to(states.dtype)

    def _sums(self, states: Tensor) -> Tensor:
        """The product in float32. A row with NaN or infinity becomes no finite number."""
        codes, scales = quantize_rows(states.flatten(0, -2), self._largest)
        zero = self._largest + 1
        sums: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes.add_(zero).to(torch.uint8),
            1.0,
            zero,
            self._packed,
            self._scales,
            self._zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return sums.mul_(scales).view(*states.shape[:-1], self._num_out)


def quantize_rows(rows: Tensor, largest: int = LARGEST) -> tuple[Tensor, Tensor]:
    """Codes of rows [..., in_features], whole numbers in float32, and their scales [..., 1]."""
    scales = rows.abs().amax(-1, keepdim=True).float().div_(largest)
    scales.clamp_(min=torch.finfo(torch.float32).tiny)  # a row of zeros may have any scale
    return torch.div(rows, scales).round_(), scales


@functools.cache
def is_exact(largest: int = LARGEST) -> bool:
    """Whether this torch has the operators, and sums of the largest codes are right here."""
    try:
        with torch.inference_mode():
            signs = torch.tensor([1, -1, 1, 1, -1, -1, 1, -1], dtype=torch.int8).repeat(64)
            codes = torch.stack([signs * LARGEST, torch.full_like(signs, LARGEST)])
            weight = DynamicInt8Weight(Int8Weight(codes, torch.ones(2)), largest)
            rows = torch.stack([signs, torch.ones_like(signs), -signs]).float()
            found = weight.product(rows * largest)
            expected = (rows * largest).double() @ codes.T.double()
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.info("rows are not rounded to int8: %s", str(error).split("\n", 1)[0])
        return False
    return torch.equal(found.double(), expected)
