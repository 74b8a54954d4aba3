"""Loads a model tensor by tensor where transformers' loader cannot: coded weights, ranks' shares.

Owns the reading of each weight, or of a rank's share of it, and its conversion on the device. Only
one weight at a time is in memory in full precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate.utils import set_module_tensor_to_device
from safetensors import safe_open
from torch import Tensor, nn
from transformers import MllamaConfig, MllamaForConditionalGeneration

from ..decoder.coded.layout import Coding
from ..decoder.coded.linear import CodedLinear
from ..decoder.coded.weight import CodedWeight, quantize_fp8
from ..decoder.int8.linear import Int8Linear
from ..decoder.int8.quantizer import Int8Weight, quantize
from ..errors import ModelError
from ..tensor_parallel.plan import Side, narrow, rank_slice
from .formats.coded_tensor import CodedTensor
from .formats.safetensors_headers import StoredTensor, module_name
from .meta_model import NUM_EXTRA_ROWS, is_short, model_without_weights
from .quantization import FP8, is_quantized


@dataclass(slots=True, frozen=True)
class RankShare:
    """One rank's share: the side along which each linear layer is cut, by the layer's name."""

    rank: int = 0
    size: int = 1
    sides: Mapping[str, Side] = field(default_factory=dict)


WHOLE = RankShare()
# No weight of a trained model is near it: uninitialized memory is.
LARGEST_SCALE = 1e6


@dataclass(slots=True, frozen=True)
class Recipe:
    """How tensors become a model: its device, its dtype, a rank's share, how it is quantized.

    quantize: "int8", "fp8" or None. Coded weights of a checkpoint stay coded in the same layers.
    """

    device: torch.device
    dtype: torch.dtype
    share: RankShare
    quantize: str | None = None


# returns a tensor, or a rank's share of it along a side; of a coded weight its parts by suffix
Read = Callable[[Side | None, RankShare], Any]
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
    model = model_without_weights(config)
    if recipe.share.size > 1:
        narrow(model, recipe.share.sides, recipe.share.size)
    wanted = {name for name, _ in model.named_parameters()}
    for stored, read in opened:
        if stored.name in wanted:
            _place(model, stored, read, recipe, source)
        count(stored.num_bytes)
    # the rest are buffers, which no file has
    nn.Module.to(model, recipe.device)
    if recipe.device.type == "cuda":
        torch.cuda.empty_cache()  # once: conversions leave gaps
    return model


def open_tensors(folder: Path, tensors: Mapping[str, StoredTensor]) -> Opened:
    """Each tensor of a folder's files with the function that reads it, file by file."""
    with ExitStack() as stack:
        files: dict[str, _File] = {}

        def file_of(tensor: StoredTensor) -> _File:
            if tensor.file not in files:
                opened = stack.enter_context(safe_open(folder / tensor.file, framework="pt"))
                files[tensor.file] = _File(opened)
            return files[tensor.file]

        for tensor in sorted(tensors.values(), key=lambda one: one.file):
            if isinstance(tensor, CodedTensor):
                yield tensor, _parts_reader(tensor, file_of)
            else:
                yield tensor, file_of(tensor).reader(tensor.name)


class _File:
    """An open file whose tensors have their names in the module."""

    def __init__(self, opened: Any) -> None:
        self._opened = opened
        self._keys = {module_name(key): key for key in opened.keys()}  # noqa: SIM118 - no mapping

    def whole(self, name: str) -> Tensor:
        """The tensor of that name."""
        found: Tensor = self._opened.get_tensor(self._keys[name])
        return found

    def reader(self, name: str) -> Read:
        """Reads the tensor of that name, or a rank's share."""

        def read(side: Side | None, share: RankShare) -> Tensor:
            stored = self._opened.get_slice(self._keys[name])
            if side is None or len(stored.get_shape()) <= side:
                return self.whole(name)
            part = rank_slice(stored.get_shape()[side], share.rank, share.size)
            cut: Tensor = stored[part] if side is Side.OUT else stored[:, part]
            return cut

        return read


def _parts_reader(tensor: CodedTensor, file_of: Callable[[StoredTensor], _File]) -> Read:
    def read(side: Side | None, share: RankShare) -> dict[str, Tensor]:
        return {suffix: file_of(part).whole(part.name) for suffix, part in tensor.parts.items()}

    return read


def _place(model: nn.Module, stored: StoredTensor, read: Read, recipe: Recipe, source: str) -> None:
    name = stored.name
    module_path, _, kind = name.rpartition(".")
    side = recipe.share.sides.get(module_path)
    value = read(side, recipe.share)
    is_kept = kind == "weight" and is_quantized(name)
    try:
        if isinstance(stored, CodedTensor):
            parts = {suffix: part.to(recipe.device) for suffix, part in value.items()}
            coded = stored.build(stored, parts)
            if not bool((coded.scales.abs() < LARGEST_SCALE).all()):  # false for NaN too
                raise ModelError(
                    f"{source}: {name} has scales that are NaN or too large: download the file "
                    "again; if you quantized it, calibrate with images, which cross-attention needs"
                )
            weight = _cut(coded, side, recipe.share, whole=not is_kept)
            if is_kept:
                return _replace(model, module_path, coded_layer(weight, recipe.dtype))
            value = _dense_share(weight.whole(recipe.dtype), side, recipe.share)
        elif is_kept and recipe.quantize is not None:
            return _replace(model, module_path, quantized_layer(value, recipe))
    except ValueError as error:
        raise ModelError(f"{source}: {name} cannot be quantized: {error}") from None
    if is_short(name, len(value), cast(MllamaConfig, model.config)):
        value = F.pad(value, (0, 0, 0, NUM_EXTRA_ROWS))
    set_module_tensor_to_device(
        model, name, recipe.device, value, dtype=recipe.dtype, clear_cache=False
    )


def coded_layer(weight: CodedWeight, dtype: torch.dtype) -> nn.Module:
    """The layer of a coded weight; plain int8 by row is the layer of --quantize int8."""
    is_by_row = weight.coding is Coding.INT8 and weight.scales.shape[1] == 1
    if is_by_row and weight.zeros is None and weight.order is None:
        return Int8Linear(Int8Weight(weight.codes, weight.scales[:, 0].to(dtype)))
    return CodedLinear(weight, dtype)


def quantized_layer(value: Tensor, recipe: Recipe) -> nn.Module:
    """The layer of a plain weight, quantized on the device. Raises ValueError for NaN."""
    weight = value.to(recipe.device)
    if recipe.quantize == FP8:
        return CodedLinear(quantize_fp8(weight), recipe.dtype)
    return Int8Linear(quantize(weight, recipe.dtype))


def _cut(weight: CodedWeight, side: Side | None, share: RankShare, *, whole: bool) -> CodedWeight:
    """A rank's share of a weight that stays coded."""
    if whole or side is None:
        return weight
    part = rank_slice(weight.shape[side], share.rank, share.size)
    return weight.outputs(part) if side is Side.OUT else weight.inputs(part)


def _dense_share(value: Tensor, side: Side | None, share: RankShare) -> Tensor:
    if side is None:
        return value
    part = rank_slice(value.shape[side], share.rank, share.size)
    return value[part] if side is Side.OUT else value[:, part]


def _replace(model: nn.Module, module_path: str, layer: nn.Module) -> None:
    linear = model.get_submodule(module_path)
    assert isinstance(linear, nn.Linear), "only linear layers are quantized"
    assert linear.bias is None, "the decoder's linear layers have no bias"
    parent, _, child = module_path.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
