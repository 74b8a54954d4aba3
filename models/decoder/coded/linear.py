"""A linear layer over a coded weight.

Owns which product is used for how many rows. Knows nothing of how a kernel computes.

    rows of the input      CUDA                            CPU
    few (a decode step)    fused Triton kernel, if its     decoded, some channels at a time
                           trial gives the right result
    many (a prefill)       decoded, some channels at a     decoded, some channels at a time
                           time

The decoded weight is rounded to the compute type and then multiplied, so the layer's result is that
of `nn.Linear` with the dequantized weight.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from ...kernels import float32_products
from ...kernels.self_test import are_usable
from .layout import Coding
from .weight import CodedWeight

# With more rows than this a product costs arithmetic, so decoding first is cheaper; with fewer the
# weight is decoded again for each 64 rows, in registers (estimated).
FEW_ROWS_CUDA = 256
# weights that are decoded at once
CHUNK_CPU = 1 << 20
CHUNK_CUDA = 1 << 24


class CodedLinear(nn.Module):
    """Gives the result of `nn.Linear` with the dequantized weight. Inference only, no bias."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    table: Tensor | None
    order: Tensor | None
    bias: Tensor | None
    _pairs: Tensor | None

    def __init__(self, weight: CodedWeight, dtype: torch.dtype) -> None:
        """dtype: the compute type."""
        super().__init__()
        self.coding = weight.coding
        self.out_features, self.in_features = weight.shape
        for name in ("codes", "scales", "zeros", "table", "order"):
            self.register_buffer(name, getattr(weight, name))
        self.register_buffer("_pairs", weight.pairs(), persistent=False)
        self.bias = None
        self.dtype = dtype
        self._has_kernel = has_kernel(weight.coding, weight.codes.device, dtype)

    @property
    def weight(self) -> CodedWeight:
        """The layer's weight."""
        return CodedWeight(self.coding, self.codes, self.scales, self.zeros, self.table, self.order)

    def forward(self, states: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], in the dtype of the states."""
        rows = states.reshape(-1, self.in_features)
        if self.order is not None:
            rows = rows.index_select(1, self.order)
        is_few = len(rows) <= FEW_ROWS_CUDA and self._has_kernel
        product = self._fused(rows) if is_few else self._decoded(rows)
        return product.view(*states.shape[:-1], self.out_features)

    def _fused(self, rows: Tensor) -> Tensor:
        from .product import fused_product

        return fused_product(rows, self.weight)

    def _decoded(self, rows: Tensor) -> Tensor:
        chunk = CHUNK_CUDA if rows.device.type == "cuda" else CHUNK_CPU
        size, weight = max(1, chunk // self.in_features), self.weight
        products = []
        for start in range(0, self.out_features, size):
            part = slice(start, start + size)
            decoded = weight.decode(part, dtype=rows.dtype, pairs=self._pairs)
            products.append(float32_products.linear(rows, decoded))
        return products[0] if len(products) == 1 else torch.cat(products, 1)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, coding={self.coding}, groups={self.scales.shape[1]}"


@functools.cache
def has_kernel(coding: Coding, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether few rows use the fused kernel; loading tries it once. As int8's, not in float32."""
    if dtype == torch.float32:
        return False

    def trial() -> list[tuple[Tensor, Tensor]]:
        from .product import trial_pairs

        return trial_pairs(coding, device, dtype)

    return are_usable(f"{coding} products of few rows", device, trial)
