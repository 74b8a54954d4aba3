"""Linear layers with weights stored in the order of a CPU's bfloat16 instructions.

torch's linear layer in bfloat16 reorders its weight at every call, which for the few rows of a
decode step costs more than the product. Here the weight is reordered once, by the operators that
torch's compiler uses for frozen weights (torch/_inductor/mkldnn_lowerings.py). They are private:
without them the model keeps torch's layers.
"""

from __future__ import annotations

import functools
import logging
from typing import TypeGuard

import torch
from torch import Tensor, nn

from ..kernels import float32_products
from ..kernels.float32_products import WidenedLinear, WidenedPatches

logger = logging.getLogger(__name__)


class PackedWeight:
    """A reordered weight, optionally with a bias. Inference only."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight: [out_features, in_features]; it is copied."""
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self._bias = None if bias is None else bias.detach()

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
        self._packed = PackedWeight(linear.weight, linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return self._packed.product(states)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def pack_linears(model: nn.Module) -> int:
    """Replace every bfloat16 linear layer on a CPU, in place. Returns how many were packed.

    One layer at a time, so that no second copy of the model is in memory. On a CPU without
    bfloat16 instructions a layer keeps its weight and multiplies many rows in float32; so do
    convolutions.
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
    """Whether to pack that weight: bfloat16 on a CPU that has the operators."""
    return _is_half_on_cpu(weight) and _has_operators()


def _is_slow(weight: Tensor) -> bool:
    """Whether this CPU multiplies that weight faster in float32; tried while the model loads."""
    return _is_half_on_cpu(weight) and float32_products.is_bfloat16_slow()


def _is_half_on_cpu(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16


@functools.cache
def _has_operators() -> bool:
    """Whether this torch and this CPU have the operators, by trying them."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        with torch.inference_mode():
            packed = PackedWeight(torch.ones(8, 8, dtype=torch.bfloat16))
            states = torch.ones(1, 8, dtype=torch.bfloat16)
            packed.product_plus(packed.product(states), states)
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.info("linear layers keep torch's weight layout: %s", str(error).split("\n", 1)[0])
        return False
    return True
