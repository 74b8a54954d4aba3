"""Layers that combine what the ranks computed; they wrap plain, packed and quantized layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .group import Group
from .plan import HEAD, Side


class SummedLinear(nn.Module):
    """A layer cut along its inputs: sums the ranks' products, then adds the bias once."""

    def __init__(self, inner: Any, group: Group) -> None:
        """Take the bias from `inner`, which may be any layer with a `bias`."""
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
    """A layer cut along its outputs, which are joined: the head."""

    def __init__(self, inner: nn.Module, group: Group) -> None:
        super().__init__()
        self.inner = inner
        self.group = group

    def forward(self, states: Tensor) -> Tensor:
        """[..., in] to [..., out of all ranks]."""
        return self.group.join(self.inner(states))


def connect(model: nn.Module, linears: Mapping[str, Side], group: Group) -> None:
    """Wrap a rank's layers, in place, after its weights are loaded."""
    for name, side in linears.items():
        if side is Side.IN or name == HEAD:
            parent, child = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            wrapper = SummedLinear if side is Side.IN else JoinedLinear
            setattr(parent, child, wrapper(getattr(parent, child), group))
