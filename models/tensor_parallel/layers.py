"""Layers that make one result of what the ranks computed.

Owns the two wrappers and where they go. Knows nothing of what a rank's own product is: a plain,
packed or quantized layer is wrapped alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .group import Group
from .plan import HEAD, Side


class SummedLinear(nn.Module):
    """A layer cut along its inputs: the ranks' products are added up, then the bias, once."""

    def __init__(self, inner: Any, group: Group) -> None:
        """Takes the bias away from `inner`, which may be any layer with a `bias`."""
        super().__init__()
        self.inner = inner
        self.group = group
        self._bias: Tensor | None = inner.bias
        inner.bias = None

    @property
    def has_bias(self) -> bool:
        return self._bias is not None

    def forward(self, states: Tensor) -> Tensor:
        """[..., in of the rank] to [..., out], the same on every rank."""
        result = self.group.add_up(self.inner(states))
        return result if self._bias is None else result + self._bias


class JoinedLinear(nn.Module):
    """A layer cut along its outputs whose whole output is wanted: the head."""

    def __init__(self, inner: nn.Module, group: Group) -> None:
        super().__init__()
        self.inner = inner
        self.group = group

    def forward(self, states: Tensor) -> Tensor:
        """[..., in] to [..., out of all ranks]."""
        return self.group.join(self.inner(states))


def connect(model: nn.Module, linears: Mapping[str, Side], group: Group) -> None:
    """Put the wrappers around a rank's layers, in place, when its weights are there."""
    for name, side in linears.items():
        if side is Side.IN or name == HEAD:
            parent, child = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            wrapper = SummedLinear if side is Side.IN else JoinedLinear
            setattr(parent, child, wrapper(getattr(parent, child), group))
