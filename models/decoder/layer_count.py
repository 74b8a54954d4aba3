"""Counts the layers that a model has begun, so that a long step can be told from a stuck one.

Owns one number. Knows nothing of steps or of who reads it.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class LayerCount:
    """How many decoder and vision layers a model has begun since it was loaded.

    Read from another thread: a step that computes counts on, a step that hangs does not.
    One a model, however many runners compute with it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.num_begun = 0
        for module in model.modules():
            if isinstance(module, nn.ModuleList):
                for layer in module:
                    layer.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, inputs: Any) -> None:
        self.num_begun += 1
