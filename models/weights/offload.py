"""Brings an offloaded part to its device as one, not layer by layer.

Owns the exchange of accelerate's hooks of one module. Knows nothing of why it is offloaded.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import PrefixedDataset
from torch import nn


def bring_whole(model: nn.Module, part: str, device: torch.device) -> None:
    """Let all weights of an offloaded part come when it is called, and go after it.

    For a module whose own code asks a child's weight for its device, as transformers' vision model
    asks its patch embedding: layer by layer that weight is not there yet.
    """
    module = model.get_submodule(part)
    hooks: list[Any] = [getattr(child, "_hf_hook", None) for child in module.modules()]
    stored = next(hook.weights_map for hook in hooks if getattr(hook, "weights_map", None))
    weights = stored.dataset if isinstance(stored, PrefixedDataset) else stored
    remove_hook_from_module(module, recurse=True)
    hook = AlignDevicesHook(
        execution_device=device,
        offload=True,
        place_submodules=True,
        weights_map=PrefixedDataset(weights, f"{part}."),
    )
    add_hook_to_module(module, hook)
