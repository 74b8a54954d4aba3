"""Linear layers whose weights lie as a CPU's bfloat16 instructions read them.

Owns the exchange of a model's linear layers. Knows nothing of Mllama.

torch's own linear layer in bfloat16 reorders its weight at every call, which for the few rows of a
decode step costs more than the product. Here the weight is reordered once, by the operators that
torch's compiler uses for frozen weights (torch/_inductor/mkldnn_lowerings.py). They are private, so
that a torch without them keeps its own layers.
"""

from __future__ import annotations

import logging
from typing import TypeGuard

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


class PackedLinear(nn.Module):
    """A linear layer with a reordered weight; gives what `nn.Linear` gives. Inference only."""

    def __init__(self, linear: nn.Linear) -> None:
        """Takes a copy of the layer's weight: drop the layer to free it."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, states: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(
            states, self._weight, self._bias, "none", [], ""
        )
        return result

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def pack_linears(model: nn.Module) -> int:
    """Exchange every bfloat16 linear layer on a CPU, in place; how many were exchanged.

    One at a time, so that no second copy of the whole model is ever in memory.
    """
    if not _can_pack():
        return 0
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if _is_packable(child):
                setattr(parent, name, PackedLinear(child))
                count += 1
    return count


def _is_packable(module: nn.Module) -> TypeGuard[nn.Linear]:
    # exactly nn.Linear: a quantized layer is a subclass with a weight of its own kind
    if type(module) is not nn.Linear:
        return False
    return module.weight.device.type == "cpu" and module.weight.dtype == torch.bfloat16


def _can_pack() -> bool:
    """Whether this torch has the operators and this CPU bfloat16 products, tried on a small one."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        layer = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
        with torch.inference_mode():
            PackedLinear(layer)(torch.ones(1, 8, dtype=torch.bfloat16))
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.info("linear layers keep torch's own layout: %s", str(error).split("\n", 1)[0])
        return False
    return True
