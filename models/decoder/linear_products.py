"""Products of linear layers that read the same states, joined into one.

nn.Linear       weights joined; packed if the CPU gains by it; else bfloat16 is widened by parts
Int8Linear      codes and scales joined: each output channel keeps its scale; packed if the CPU
                gains by it
CodedLinear     the same, if coding, groups, tables and orders are equal
SummedLinear    a rank's product, summed over the ranks; then the addend, once
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..kernels import float32_products
from ..tensor_parallel.layers import SummedLinear
from .coded.linear import CodedLinear
from .coded.weight import can_join as can_join_weights
from .coded.weight import join
from .int8.linear import Int8Linear
from .int8.quantizer import Int8Weight
from .packed_linear import packed_weight

# adds to a product of states in place: change(product, states)
Change = Callable[[Tensor, Tensor], None]


class LinearProduct(nn.Module):
    """The outputs of linear layers on the same states, side by side."""

    @abstractmethod
    def forward(self, states: Tensor) -> Tensor:
        """[num_tokens, in_features] to [num_tokens, out_features]."""

    def plus(self, states: Tensor, addend: Tensor) -> Tensor:
        """The product plus `addend`, of its shape, in one operation if possible."""
        return self(states) + addend

    def changed(self, states: Tensor, change: Change) -> Tensor:
        """The product after `change` has added to it, on each rank before ranks are summed."""
        result: Tensor = self(states)
        change(result, states)
        return result

    def changed_plus(self, states: Tensor, change: Change, addend: Tensor) -> Tensor:
        """The changed product plus `addend`, of its shape, which is not written to."""
        return self.changed(states, change) + addend


class PlainProduct(LinearProduct):
    """Of weights in the compute type."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        weights = [linear.weight.detach() for linear in linears]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self._packed = packed_weight(weight)
        kept = None if self._packed is not None else nn.Parameter(weight, requires_grad=False)
        self._weight: nn.Parameter | None
        self.register_parameter("_weight", kept)

    def forward(self, states: Tensor) -> Tensor:
        if self._packed is not None:
            return self._packed.product(states)
        assert self._weight is not None
        return float32_products.linear(states, self._weight)

    def plus(self, states: Tensor, addend: Tensor) -> Tensor:
        """See `LinearProduct.plus`; rounded once."""
        if self._packed is not None:
            return self._packed.product_plus(states, addend)
        assert self._weight is not None
        return float32_products.linear(states, self._weight, addend)

    def changed_plus(self, states: Tensor, change: Change, addend: Tensor) -> Tensor:
        """See `LinearProduct.changed_plus`; the change is added to the sum of both."""
        result = self.plus(states, addend)
        change(result, states)
        return result


class Int8Product(LinearProduct):
    """Of int8 weights; packed if the CPU gains by it."""

    def __init__(self, linears: Sequence[Int8Linear]) -> None:
        super().__init__()
        linear = linears[0]
        if len(linears) > 1:
            codes = torch.cat([linear.codes for linear in linears])
            scales = torch.cat([linear.scales for linear in linears])
            linear = Int8Linear(Int8Weight(codes, scales))
        self._packed = linear.packed()
        self._linear = linear if self._packed is None else None

    def forward(self, states: Tensor) -> Tensor:
        if self._packed is not None:
            return self._packed.product(states)
        assert self._linear is not None
        product: Tensor = self._linear(states)
        return product

    def plus(self, states: Tensor, addend: Tensor) -> Tensor:
        """See `LinearProduct.plus`; rounded once where the weight is packed."""
        if self._packed is not None:
            return self._packed.product_plus(states, addend)
        return super().plus(states, addend)


class CodedProduct(LinearProduct):
    """Of coded weights."""

    def __init__(self, linears: Sequence[CodedLinear]) -> None:
        super().__init__()
        first = linears[0]
        self._linear = first
        if len(linears) > 1:
            self._linear = CodedLinear(join([linear.weight for linear in linears]), first.dtype)

    def forward(self, states: Tensor) -> Tensor:
        product: Tensor = self._linear(states)
        return product


class SeparateProducts(LinearProduct):
    """Of layers whose weights cannot be joined: a product each, side by side."""

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        super().__init__()
        self._products = nn.ModuleList(product_of([linear]) for linear in linears)

    def forward(self, states: Tensor) -> Tensor:
        return torch.cat([product(states) for product in self._products], dim=-1)


class SummedProduct(LinearProduct):
    """Of a layer that is cut along its inputs; all ranks get the sum."""

    def __init__(self, linear: SummedLinear) -> None:
        super().__init__()
        self._inner = product_of([linear.inner])
        self._group = linear.group

    def forward(self, states: Tensor) -> Tensor:
        return self._group.add_up(self._inner(states))

    def changed(self, states: Tensor, change: Change) -> Tensor:
        """See `LinearProduct.changed`; the change is of this rank's inputs."""
        return self._group.add_up(self._inner.changed(states, change))


def product_of(linears: Sequence[nn.Module]) -> LinearProduct:
    """The product of layers for which `can_join` is true.

    Several layers' weights are copied: drop the layers to free them.
    """
    first = linears[0]
    if isinstance(first, SummedLinear):
        assert len(linears) == 1, "a sum over ranks cannot be joined"
        return SummedProduct(first)
    if len(linears) > 1 and not _are_alike(linears):
        return SeparateProducts(linears)
    if isinstance(first, CodedLinear):
        return CodedProduct(cast(Sequence[CodedLinear], linears))
    if isinstance(first, Int8Linear):
        return Int8Product(cast(Sequence[Int8Linear], linears))
    return PlainProduct(cast(Sequence[nn.Linear], linears))


def _are_alike(linears: Sequence[nn.Module]) -> bool:
    """Whether weights can be joined: of one kind, coded weights of equal groups."""
    if len({type(linear) for linear in linears}) > 1:
        return False
    if not isinstance(linears[0], CodedLinear):
        return True
    return can_join_weights([cast(CodedLinear, linear).weight for linear in linears])


def can_join(linear: nn.Module) -> bool:
    """Whether a layer can be joined: of a known kind, without bias."""
    if isinstance(linear, SummedLinear):
        return not linear.has_bias and can_join(linear.inner)
    # exact types: layers of bitsandbytes are subclasses with other weights
    layer: Any = linear
    return type(linear) in (nn.Linear, Int8Linear, CodedLinear) and layer.bias is None
