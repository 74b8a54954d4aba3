"""Products of rows and a packed weight by this project's C, where a compiler is installed.

torch reads a weight slowly for the 2 to 16 rows of a decode step: it reorders it at every call, or
widens its numbers again for each row. The C (`row_products.c`) keeps the weight in the order in
which it is read, widens bfloat16 and int8 in registers, and sums in float32. A trial while the
model loads decides whether it is right and faster here.

A row has the same bits whatever rows are beside it, and with any number of threads.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import c_library
from .c_library import NUMBER, POINTER, SIZE
from .cpu_trial import Product, is_product_faster
from .self_test import what_is_wrong

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("row_products.c")
# the order of the C file's kinds
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
# the least inputs and outputs of a weight: smaller models are not worth a compiler's seconds
MIN_SIDE = 256

# row_products of the C file
Function = Callable[..., None]


class RowWeight:
    """A weight in panels of some output channels each. Inference only."""

    __slots__ = ("_bias", "_out_features", "_panels", "_scales")

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, scales: Tensor | None = None
    ) -> None:
        """weight: [out_features, in_features], float32, bfloat16 or int8; it is copied.

        bias, scales: [out_features]; sums are multiplied by scales first.
        """
        self._panels = _panels(weight.detach(), _library()[1])
        self._out_features = len(weight)
        self._bias = None if bias is None else bias.detach().contiguous()
        self._scales = None if scales is None else scales.detach().contiguous()

    @property
    def nbytes(self) -> int:
        """Of the weight, its scales and the bias."""
        others = [one.nbytes for one in (self._bias, self._scales) if one is not None]
        return self._panels.nbytes + sum(others)

    def product(self, states: Tensor) -> Tensor:
        """[..., in_features] in float32 or bfloat16 to [..., out_features]."""
        return self._product(states, self._bias, 0)

    def product_plus(self, states: Tensor, addend: Tensor) -> Tensor:
        """The product, without the bias, plus an addend of its shape, rounded once."""
        return self._product(states, addend.contiguous(), self._out_features)

    def _product(self, states: Tensor, addend: Tensor | None, addend_stride: int) -> Tensor:
        num_in, num_out = self._panels.shape[1], self._out_features
        states = states.contiguous()
        num_rows = states.numel() // num_in
        result = states.new_empty(*states.shape[:-1], num_out)
        is_half = states.dtype == torch.bfloat16
        wide = torch.empty(num_rows * num_in) if is_half else None
        _library()[0](
            _KINDS[self._panels.dtype],
            _KINDS[states.dtype],
            num_rows,
            num_in,
            num_out,
            states.data_ptr(),
            None if wide is None else wide.data_ptr(),
            self._panels.data_ptr(),
            None if self._scales is None else self._scales.data_ptr(),
            None if addend is None else addend.data_ptr(),
            addend_stride,
            result.data_ptr(),
            torch.get_num_threads(),
        )
        return result


def can_pack(weight: Tensor) -> bool:
    """Whether the C is there and right for that weight, and the weight is large enough."""
    is_large = weight.device.type == "cpu" and min(weight.shape) >= MIN_SIDE
    return is_large and c_library.is_allowed() and weight.dtype in _KINDS and is_right(weight.dtype)


@functools.cache
def is_right(dtype: torch.dtype) -> bool:
    """Whether the C is there and computes right with weights of this type; tried once."""
    if _loaded() is None:
        return False
    if (reason := what_is_wrong(lambda: _trial_pairs(dtype))) is None:
        return True
    logger.warning("products of %s weights use torch: %s", dtype, reason)
    return False


def is_faster(
    weight: Tensor,
    others: Sequence[Product],
    row_dtype: torch.dtype | None = None,
) -> bool:
    """Whether the C is clearly faster than the best of other products of that weight.

    others: each from rows [n, in] to [n, out]; row_dtype: the rows' type, by default the weight's.
    """
    product, dtype = RowWeight(weight).product, row_dtype or weight.dtype
    return is_product_faster(product, others, weight.shape[1], dtype)


def _trial_pairs(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Results and what they should be: few rows and many, and channels that fill no panel."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(83, 1300, generator=generator) * 20).to(dtype)
    packed, exact = RowWeight(weight), weight.double()
    pairs = []
    for count in (1, 2, 3, 5, 14, 260):
        rows = torch.randn(count, 1300, generator=generator) / 700
        expected = rows.double() @ exact.T
        pairs.append((packed.product(rows).double(), expected))
        half = rows.bfloat16()
        found = packed.product_plus(half, torch.ones(count, 83).bfloat16())
        pairs.append((found, 1 + half.double() @ exact.T))
    return pairs


def _panels(weight: Tensor, width: int) -> Tensor:
    """The weight as [panels, in_features, width], the last panel padded with zeros."""
    num_out, num_in = weight.shape
    num_panels = -(-num_out // width)
    panels = torch.zeros(num_panels, num_in, width, dtype=weight.dtype)
    whole = num_out // width
    panels[:whole].copy_(weight[: whole * width].view(whole, width, num_in).transpose(1, 2))
    if whole < num_panels:
        rest = weight[whole * width :]
        panels[whole, :, : len(rest)].copy_(rest.T)
    return panels


def _library() -> tuple[Function, int]:
    found = _loaded()
    assert found is not None, "ask is_right() first"
    return found


@functools.cache
def _loaded() -> tuple[Function, int] | None:
    """The C's product and the channels of a panel; None without a library."""
    library = c_library.load(
        SOURCE,
        row_products=[NUMBER, NUMBER, SIZE, SIZE, SIZE, *[POINTER] * 5, SIZE, POINTER, NUMBER],
    )
    if library is None:
        return None
    library.row_products_width.restype = SIZE
    return library.row_products, int(library.row_products_width())
