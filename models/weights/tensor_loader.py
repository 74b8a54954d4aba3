"""Loads a model tensor by tensor where transformers' loader cannot: int8 weights, ranks' shares.

Owns the reading of each weight, or of a rank's share of it, and its conversion on the device. Only
one weight at a time is in memory in full precision.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors import safe_open
from torch import Tensor, nn
from transformers import MllamaConfig, MllamaForConditionalGeneration

from ..decoder.int8.linear import Int8Linear
from ..decoder.int8.quantizer import quantize
from ..errors import ModelError
from ..tensor_parallel.plan import Side, narrow, rank_slice
from .safetensors_headers import StoredTensor, module_name


@dataclass(slots=True, frozen=True)
class RankShare:
    """One rank's share: the side along which each linear layer is cut, by the layer's name."""

    rank: int = 0
    size: int = 1
    sides: Mapping[str, Side] = field(default_factory=dict)


WHOLE = RankShare()


@dataclass(slots=True, frozen=True)
class Recipe:
    """How tensors become a model: its device, its dtype, a rank's share, and what is quantized.

    quantizes: whether to store the linear layer of that name in int8.
    """

    device: torch.device
    dtype: torch.dtype
    share: RankShare
    quantizes: Callable[[str], bool]


# returns a tensor, or a rank's share of it along a side
Read = Callable[[Side | None, RankShare], Tensor]
# all tensors of a model, each with the function that reads it
Opened = Iterable[tuple[StoredTensor, Read]]


def load_tensors(
    opened: Opened,
    config: MllamaConfig,
    recipe: Recipe,
    count: Callable[[int], None],
    source: str,
) -> MllamaForConditionalGeneration:
    """The model, with every weight on its device.

    count: called with the bytes of each tensor that was read. source: the checkpoint, for messages.
    Raises ModelError for a weight that cannot be quantized.
    """
    with init_empty_weights(include_buffers=False):
        model = cast(MllamaForConditionalGeneration, MllamaForConditionalGeneration(config))
    if recipe.share.size > 1:
        narrow(model, recipe.share.sides, recipe.share.size)
    wanted = {name for name, _ in model.named_parameters()}
    for stored, read in opened:
        if stored.name in wanted:
            _place(model, stored.name, read, recipe, source)
        count(stored.num_bytes)
    # the rest are buffers, which no file has
    nn.Module.to(model, recipe.device)
    if recipe.device.type == "cuda":
        torch.cuda.empty_cache()  # once: conversions leave gaps
    return model


def open_tensors(folder: Path, tensors: Mapping[str, StoredTensor]) -> Opened:
    """Each tensor of a folder's files with the function that reads it, file by file."""
    by_file: dict[str, list[StoredTensor]] = defaultdict(list)
    for tensor in tensors.values():
        by_file[tensor.file].append(tensor)
    for file, stored in by_file.items():
        with safe_open(folder / file, framework="pt") as opened:
            keys = {module_name(key): key for key in opened.keys()}  # noqa: SIM118 - no mapping
            for tensor in stored:
                yield tensor, _reader(opened, keys[tensor.name])


def _reader(opened: Any, key: str) -> Read:
    def read(side: Side | None, share: RankShare) -> Tensor:
        stored = opened.get_slice(key)
        if side is None or len(stored.get_shape()) <= side:
            whole: Tensor = opened.get_tensor(key)
            return whole
        part = rank_slice(stored.get_shape()[side], share.rank, share.size)
        cut: Tensor = stored[part] if side is Side.OUT else stored[:, part]
        return cut

    return read


def _place(model: nn.Module, name: str, read: Read, recipe: Recipe, source: str) -> None:
    module_path, _, kind = name.rpartition(".")
    value = read(recipe.share.sides.get(module_path), recipe.share)
    if kind != "weight" or not recipe.quantizes(module_path):
        set_module_tensor_to_device(
            model, name, recipe.device, value, dtype=recipe.dtype, clear_cache=False
        )
        return
    linear = model.get_submodule(module_path)
    assert isinstance(linear, nn.Linear), "only linear layers are quantized"
    assert linear.bias is None, "the decoder's linear layers have no bias"
    try:
        packed = quantize(value.to(recipe.device), recipe.dtype)
    except ValueError as error:
        raise ModelError(f"{source}: {name} cannot be quantized: {error}") from None
    parent, _, child = module_path.rpartition(".")
    setattr(model.get_submodule(parent), child, Int8Linear(packed))
