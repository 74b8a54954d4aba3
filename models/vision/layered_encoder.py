"""The vision model's forward, a few layers at a time, so that other requests' steps run in between.

Repeats transformers' forward between the vision model's layers, and keeps the state between parts.

    layer 0 .. n - 1      of the local encoder; the inputs of some are taps
    layer n .. n + g - 1  of the global encoder, after a norm and the tiles' positions

transformers keeps the states of all layers; this keeps the taps. A tile attends to all tiles of its
image in every layer, so an image can be split only at layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers.models.mllama.modeling_mllama import MllamaVisionModel

from .real_first import REAL_FIRST_NAME, RealFirst

_MULTIPLE = 8  # transformers pads a tile's patches to a multiple of it


def padded_patches(num_patches: int) -> int:
    """How many positions a tile with that many patches has in the encoder."""
    return -(-num_patches // _MULTIPLE) * _MULTIPLE


@dataclass(slots=True)
class PartialImages:
    """Images that are encoded together, between two parts.

    states: [images, positions, hidden], in `order`; taps: of that shape, by layer.
    aspect_ratio_ids: [images, 1]. num_layers: how many layers have run.
    """

    states: Tensor
    order: RealFirst
    aspect_ratio_ids: Tensor
    num_layers: int = 0
    taps: dict[int, Tensor] = field(default_factory=dict)


class LayeredVision:
    """The vision model's forward, split at its layers; each tap is the input of its layer."""

    def __init__(self, model: MllamaVisionModel) -> None:
        """Sets the model's attention to `real_first_attention`."""
        self._model: Any = model
        self._local: list[Any] = list(self._model.transformer.layers)
        self._layers: list[Any] = [*self._local, *self._model.global_transformer.layers]
        indices = model.intermediate_layers_indices or []
        self._taps = [index % len(self._local) for index in indices]
        model.config._attn_implementation = REAL_FIRST_NAME

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def begin(
        self, pixel_values: Tensor, num_tiles: Sequence[int], aspect_ratio_ids: Tensor
    ) -> PartialImages:
        """Images before their first layer.

        pixel_values: [images, max_num_tiles, 3, tile_size, tile_size], padding tiles 0. num_tiles:
        real tiles of each image. aspect_ratio_ids: [images, 1].
        """
        model = self._model
        weight, shape = model.patch_embedding.weight, pixel_values.shape[:2]
        tiles = pixel_values.flatten(0, 1).to(weight.dtype)
        patches = model.patch_embedding(tiles).flatten(2).transpose(1, 2).unflatten(0, shape)
        placed = model.pre_tile_positional_embedding(patches, aspect_ratio_ids)
        states = model.apply_class_embedding(placed.flatten(0, 1)).unflatten(0, shape)
        states = model.layernorm_pre(model.gated_positional_embedding(states, aspect_ratio_ids))
        num_patches = states.shape[2]
        padded = padded_patches(num_patches)
        states = functional.pad(states, (0, 0, 0, padded - num_patches))
        order = RealFirst(tuple(num_tiles), shape[1], num_patches, padded)
        return PartialImages(order.ordered(states), order, aspect_ratio_ids)

    def advance(self, images: PartialImages, end: int) -> None:
        """Run the layers before `end` that have not run."""
        for index in range(images.num_layers, end):
            if index in self._taps:
                images.taps[index] = images.states
            # transformers hands the mask to the attention unread
            images.states = self._layers[index](images.states, attention_mask=images.order)
            if index + 1 == len(self._local):
                images.states = self._between(images)
        images.num_layers = end

    def finish(self, images: PartialImages) -> Tensor:
        """The projector's input after the last layer: [real patches of all images, width]."""
        assert images.num_layers == self.num_layers, "layers of the images have not run yet"
        return torch.cat([self._joined(images, row) for row in range(len(images.states))])

    def _joined(self, images: PartialImages, row: int) -> Tensor:
        num_real = images.order.num_real[row]
        taps = [images.taps[index][row, :num_real] for index in self._taps]
        interleaved = torch.stack(taps, dim=-1).flatten(1)
        return torch.cat([images.states[row, :num_real], interleaved], dim=-1)

    def _between(self, images: PartialImages) -> Tensor:
        """From the local to the global encoder."""
        states = images.order.by_tile(self._model.layernorm_post(images.states))
        placed = self._model.post_tile_positional_embedding(states, images.aspect_ratio_ids)
        return images.order.ordered(placed)


def is_offloaded(model: MllamaVisionModel) -> bool:
    """Whether the model's weights are loaded for each call, so that it should not be split."""
    return bool(getattr(getattr(model, "_hf_hook", None), "offload", False))


@contextmanager
def loaded_weights(model: MllamaVisionModel) -> Iterator[None]:
    """Load an offloaded model's weights, and drop them afterwards."""
    if not is_offloaded(model):
        yield
        return
    hook: Any = model._hf_hook
    hook.pre_forward(model)
    try:
        yield
    finally:
        hook.post_forward(model, None)
