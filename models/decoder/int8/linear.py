"""A linear layer with an int8 weight, by the fastest product of the device.

    rows of the input      CUDA                   CPU, bfloat16          CPU, float32
    few (decodes, also     fused Triton kernel    torch's int8 kernel    unpacked, in parts
    beside a small chunk)  (if its trial is
                           right)
    many (a prefill)       unpacked, in parts     unpacked, in parts;    unpacked, in parts
                                                  float32 if faster

With few rows, reading the weight dominates, and int8 halves that. With many rows arithmetic
dominates: codes are converted to the compute dtype once for all rows, some channels at a time so
that they stay in a CPU's cache. Scales are applied to the sums, but in float16 to the codes, since
sums of codes overflow for outputs over about 40.

`packed` gives the weight that a decoder's product uses on a CPU where another is faster: this
project's C, which widens codes in registers; or oneDNN's product of rows that are rounded to int8
too (`dynamic.py`), in bfloat16 and with VNNI instructions.
"""

from __future__ import annotations

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import float32_products, row_products
from ...kernels.cpu_trial import Product, is_product_faster
from ...kernels.row_products import RowWeight
from ...kernels.self_test import are_usable
from . import dynamic
from .dynamic import DynamicInt8Weight
from .quantizer import Int8Weight

logger = logging.getLogger(__name__)

# With more rows arithmetic dominates: measured on a CPU. On a GPU unpacking costs 5 bytes a weight
# (read 1, write 2, read 2) and the fused product at most 1 for each line of 64 rows: estimated.
FEW_ROWS_CPU = 8
# Where bfloat16 products are slow, torch's int8 kernel is as fast as float32's up to here.
FEW_ROWS_CPU_FLOAT32 = 16
FEW_ROWS_CUDA = 256
# codes to unpack at once
CHUNK_CPU = 1 << 20
CHUNK_CUDA = 1 << 24
# the side of the square weight of a trial
TRIED_SIZE = 1024
# Rows are rounded to int8 for weights of at least so many inputs and outputs, and only for such a
# gain: it costs accuracy.
MIN_DYNAMIC_SIDE, LEAST_DYNAMIC_GAIN = 1024, 1.25


class Int8Linear(nn.Module):
    """As `nn.Linear` with the dequantized weight. Inference only."""

    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, weight: Int8Weight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("bias", bias)
        self._has_kernel = _has_kernel(weight.codes.device, weight.scales.dtype)

    def forward(self, states: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], in the dtype of the scales."""
        rows = states.reshape(-1, self.in_features)
        product = self._few(rows) if self._has_few(rows) else self._many(rows)
        if self.bias is not None:
            product = product + self.bias
        return product.view(*states.shape[:-1], self.out_features)

    def _has_few(self, rows: Tensor) -> bool:
        if rows.device.type == "cuda":
            return len(rows) <= FEW_ROWS_CUDA and self._has_kernel
        if rows.dtype != torch.bfloat16:
            return False
        is_wide = float32_products.is_faster(rows)
        return len(rows) <= (FEW_ROWS_CPU_FLOAT32 if is_wide else FEW_ROWS_CPU)

    def _few(self, rows: Tensor) -> Tensor:
        if rows.device.type == "cuda":
            from .product import fused_product

            return fused_product(rows, self.codes, self.scales)
        product: Tensor = torch._weight_int8pack_mm(rows.contiguous(), self.codes, self.scales)
        return product

    def _many(self, rows: Tensor) -> Tensor:
        if float32_products.is_faster(rows):
            return float32_products.sums(rows, self.codes).mul_(self.scales).to(rows.dtype)
        chunk = CHUNK_CUDA if rows.device.type == "cuda" else CHUNK_CPU
        size = max(1, chunk // self.in_features)
        unpacked = rows.new_empty(min(size, self.out_features), self.in_features)
        scales_codes = rows.dtype == torch.float16
        sums = []
        for codes, scales in zip(self.codes.split(size), self.scales.split(size), strict=True):
            part = unpacked[: len(codes)].copy_(codes)
            if scales_codes:
                part *= scales[:, None]
            sums.append(F.linear(rows, part))
        joined = sums[0] if len(sums) == 1 else torch.cat(sums, 1)
        return joined if scales_codes else joined * self.scales

    def packed(self) -> RowWeight | DynamicInt8Weight | None:
        """A packed copy, without the bias, for the fastest product; None if it is the layer's."""
        weight = Int8Weight(self.codes, self.scales)
        if _takes_dynamic(weight):
            return DynamicInt8Weight(weight)
        return RowWeight(self.codes, scales=self.scales) if _takes_rows(weight) else None

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _takes_rows(weight: Int8Weight) -> bool:
    dtype = weight.scales.dtype
    has_kind = dtype in (torch.float32, torch.bfloat16) and row_products.can_pack(weight.codes)
    return has_kind and are_rows_faster(dtype)


def _takes_dynamic(weight: Int8Weight) -> bool:
    codes, dtype = weight.codes, weight.scales.dtype
    is_large = codes.device.type == "cpu" and min(codes.shape) >= MIN_DYNAMIC_SIDE
    return is_large and dtype == torch.bfloat16 and dynamic.is_exact() and is_dynamic_faster()


@functools.cache
def is_dynamic_faster() -> bool:
    """Whether rows rounded to int8 are clearly faster here than the best other product.

    By a trial, once, in bfloat16. One weight serves all numbers of rows: two forms of it would
    take bfloat16's memory.
    """
    weight = _trial_weight(torch.bfloat16)
    others: list[Product] = [Int8Linear(weight)]
    if row_products.can_pack(weight.codes):
        others.append(RowWeight(weight.codes, scales=weight.scales).product)
    product = DynamicInt8Weight(weight).product
    if not is_product_faster(product, others, TRIED_SIZE, torch.bfloat16, LEAST_DYNAMIC_GAIN):
        return False
    logger.info("int8 layers round their inputs to int8 too: it is faster on this CPU")
    return True


def _trial_weight(dtype: torch.dtype) -> Int8Weight:
    codes = torch.ones(TRIED_SIZE, TRIED_SIZE, dtype=torch.int8)
    return Int8Weight(codes, torch.ones(TRIED_SIZE, dtype=dtype))


@functools.cache
def are_rows_faster(dtype: torch.dtype) -> bool:
    """Whether this project's C is faster than the layer for rows of that type: a trial, once."""
    weight = _trial_weight(dtype)
    return row_products.is_faster(weight.codes, [Int8Linear(weight)], dtype)


@functools.cache
def _has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether few rows use the fused kernel; it is tried once, while the model loads.

    Not in float32, whose products take no tensor cores and more registers than there are.
    """
    if dtype == torch.float32:
        return False

    def trial() -> list[tuple[Tensor, Tensor]]:
        from .product import trial_pairs

        return trial_pairs(device, dtype)

    return are_usable("int8 products of few rows", device, trial)
