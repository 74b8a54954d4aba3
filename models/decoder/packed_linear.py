"""Linear layers with weights stored in the order in which a CPU's products read them.

torch's linear layer reorders its weight at every call with more than one row, which for the few
rows of a decode step costs more than the product. Here the weight is reordered once, for one of:

RowWeight     this project's C (`kernels/row_products.py`), for large weights, where a compiler is
              installed and a trial finds it faster; of bfloat16 only without instructions for it
PackedWeight  the operators that torch's compiler uses for frozen weights
              (torch/_inductor/mkldnn_lowerings.py): of bfloat16 where the CPU has instructions for
              it; of large float32 weights, unless a trial finds torch's own clearly faster

The operators are private: without them and without the C the model keeps torch's layers.

By the C, and by the operators in float32 on a CPU with AVX2, a row has the same bits whatever rows
are beside it.
"""

from __future__ import annotations

import functools
import logging
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import float32_products, row_products
from ..kernels.cpu_trial import fastest_s, one_thread
from ..kernels.float32_products import WidenedLinear, WidenedPatches
from ..kernels.row_products import RowWeight

logger = logging.getLogger(__name__)

# The fewest numbers of a weight to pack, by its type. A call costs 25 us more than torch's in
# float32, and a smaller weight comes from the cache, where reordering it costs less.
MIN_SIZES = {torch.bfloat16: 1, torch.float32: 1 << 18}
# The trial in float32: the rows of its two products, the side of its square weight, and how much
# slower than torch's own products packed ones may be, so that noise decides nothing.
TRIED_ROWS, TRIED_SIZE, MOST_LOSS = (1, 9), 1024, 1.2


class PackedWeight:
    """A reordered weight, optionally with a bias. Inference only."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight: [out_features, in_features]; it is copied."""
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self._bias = None if bias is None else bias.detach()

    @property
    def nbytes(self) -> int:
        """Of the weight and the bias."""
        return self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def product(self, states: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(
            states, self._weight, self._bias, "none", [], ""
        )
        return result

    def product_plus(self, states: Tensor, addend: Tensor) -> Tensor:
        """The product plus an addend of its shape, rounded once."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            states, addend, self._weight, self._bias, "add"
        )
        return result


class PackedLinear(nn.Module):
    """As `nn.Linear`, with a reordered weight."""

    def __init__(self, linear: nn.Linear) -> None:
        """Copies the layer's weight: drop the layer to free it."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = packed_weight(linear.weight, linear.bias)
        assert packed is not None, "ask can_pack first"
        self._packed = packed

    def forward(self, states: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return self._packed.product(states)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def pack_linears(model: nn.Module) -> int:
    """Replace every linear layer on a CPU that can be packed, in place. Returns how many were.

    One layer at a time, so that no second copy of the model is in memory. On a CPU without
    bfloat16 instructions a bfloat16 layer keeps its weight and multiplies many rows in float32; so
    do convolutions.
    """
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if _is_packable(child):
                setattr(parent, name, PackedLinear(child))
                count += 1
            elif type(child) is nn.Linear and _is_slow(child.weight):
                child.__class__ = WidenedLinear
            elif WidenedPatches.can_replace(child) and _is_slow(child.weight):
                child.__class__ = WidenedPatches
    return count


def _is_packable(module: nn.Module) -> TypeGuard[nn.Linear]:
    # the exact type: quantized layers are subclasses with other weights
    return type(module) is nn.Linear and can_pack(module.weight)


def can_pack(weight: Tensor) -> bool:
    """Whether to pack that weight: on a CPU that has products for its type and gains by it."""
    return _takes_rows(weight) or _takes_operators(weight)


def packed_weight(weight: Tensor, bias: Tensor | None = None) -> RowWeight | PackedWeight | None:
    """The weight, packed for the faster product; None if torch's own is the fastest."""
    if _takes_rows(weight):
        return RowWeight(weight, bias)
    return PackedWeight(weight, bias) if _takes_operators(weight) else None


def _takes_rows(weight: Tensor) -> bool:
    """Whether this project's C is the fastest product of that weight."""
    dtype = weight.dtype
    if dtype not in (torch.float32, torch.bfloat16) or not row_products.can_pack(weight):
        return False
    has_instructions = dtype == torch.bfloat16 and _has_operators(dtype)
    return not has_instructions and are_rows_faster(dtype)


def _takes_operators(weight: Tensor) -> bool:
    """Whether to use oneDNN's product of a reordered weight."""
    dtype, min_size = weight.dtype, MIN_SIZES.get(weight.dtype)
    is_large = min_size is not None and weight.numel() >= min_size
    if weight.device.type != "cpu" or not is_large or not _has_operators(dtype):
        return False
    return dtype != torch.float32 or not is_packed_slow()


def _is_slow(weight: Tensor) -> bool:
    """Whether this CPU multiplies that weight faster in float32; tried while the model loads."""
    is_half = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return is_half and float32_products.is_bfloat16_slow()


@functools.cache
def are_rows_faster(dtype: torch.dtype) -> bool:
    """Whether this project's C is faster here than the best other product: a trial, once."""
    weight = torch.ones(TRIED_SIZE, TRIED_SIZE, dtype=dtype)
    others = [lambda rows: float32_products.linear(rows, weight)]
    if dtype == torch.float32 and _has_operators(dtype):
        others.append(PackedWeight(weight).product)
    return row_products.is_faster(weight, others)


@functools.cache
def is_packed_slow() -> bool:
    """Whether packed float32 products are clearly slower here: a trial of 20 ms decides, once.

    Of one row and of a few, since one weight serves both.
    """
    with torch.inference_mode(), one_thread():
        weight = torch.ones(TRIED_SIZE, TRIED_SIZE)
        packed = PackedWeight(weight)
        rows = [torch.ones(count, TRIED_SIZE) for count in TRIED_ROWS]
        plain_s = sum(fastest_s(functools.partial(F.linear, x, weight)) for x in rows)
        packed_s = sum(fastest_s(functools.partial(packed.product, x)) for x in rows)
    logger.debug("trial products took %.2g s, %.2g s of a packed weight", plain_s, packed_s)
    return packed_s > MOST_LOSS * plain_s


@functools.cache
def _has_operators(dtype: torch.dtype) -> bool:
    """Whether this torch and this CPU have the operators, by trying them."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        with torch.inference_mode():
            packed = PackedWeight(torch.ones(8, 8, dtype=dtype))
            states = torch.ones(1, 8, dtype=dtype)
            packed.product_plus(packed.product(states), states)
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.info("%s layers keep torch's weight layout: %s", dtype, str(error).split("\n", 1)[0])
        return False
    return True
