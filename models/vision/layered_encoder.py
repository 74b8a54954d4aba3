"""Encodes one image a few layers at a time, so that other requests' steps run in between.

Repeats transformers' forward between the vision model's layers, and keeps the state between parts.

    layer 0 .. n - 1      of the local encoder; the inputs of some are taps
    layer n .. n + g - 1  of the global encoder, after a norm and the tiles' positions

A tile attends to all tiles of its image in every layer, so an image can be split only at layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers.models.mllama.modeling_mllama import (
    MllamaVisionModel,
    _prepare_aspect_ratio_attention_mask,
)

_MULTIPLE = 8  # transformers pads a tile's patches to a multiple of it


def padded_patches(num_patches: int) -> int:
    """How many positions a tile with that many patches has in the encoder."""
    return -(-num_patches // _MULTIPLE) * _MULTIPLE


@dataclass(slots=True)
class PartialImage:
    """An image between two parts.

    states: [1, max_num_tiles * padded patches, hidden]; taps: of that shape, by layer. is_real:
    bool [1, max_num_tiles]; aspect_ratio_ids: [1, 1]. num_layers: how many layers have run.
    """

    states: Tensor
    is_real: Tensor
    aspect_ratio_ids: Tensor
    num_layers: int = 0
    taps: dict[int, Tensor] = field(default_factory=dict)


class LayeredVision:
    """The vision model's forward, split at its layers; each tap is the input of its layer."""

    def __init__(self, model: MllamaVisionModel) -> None:
        self._model: Any = model
        self._local: list[Any] = list(self._model.transformer.layers)
        self._layers: list[Any] = [*self._local, *self._model.global_transformer.layers]
        indices = model.intermediate_layers_indices or []
        self._taps = [index % len(self._local) for index in indices]

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def begin(
        self, pixel_values: Tensor, is_real: Tensor, aspect_ratio_ids: Tensor
    ) -> PartialImage:
        """One image before its first layer.

        pixel_values: [1, 1, max_num_tiles, 3, tile_size, tile_size], padding tiles 0.
        """
        model = self._model
        weight = model.patch_embedding.weight
        tiles = pixel_values.flatten(0, 2).to(weight.device, weight.dtype)
        patches = model.patch_embedding(tiles).flatten(2).transpose(1, 2)
        placed = model.pre_tile_positional_embedding(patches[None], aspect_ratio_ids)
        states = model.apply_class_embedding(placed[0])[None]
        states = model.layernorm_pre(model.gated_positional_embedding(states, aspect_ratio_ids))
        num_patches = states.shape[2]
        states = functional.pad(states, (0, 0, 0, padded_patches(num_patches) - num_patches))
        return PartialImage(states.flatten(1, 2), is_real, aspect_ratio_ids)

    def advance(self, image: PartialImage, end: int) -> None:
        """Run the layers before `end` that have not run."""
        mask = self._mask(image)
        for index in range(image.num_layers, end):
            if index in self._taps:
                image.taps[index] = image.states
            image.states = self._layers[index](image.states, attention_mask=mask)
            if index + 1 == len(self._local):
                image.states = self._between(image)
        image.num_layers = end

    def finish(self, image: PartialImage) -> Tensor:
        """The projector's input after the last layer: [1, max_num_tiles, patches, width]."""
        assert image.num_layers == self.num_layers, "layers of the image have not run yet"
        taps = torch.stack([image.taps[index] for index in self._taps], dim=-1).flatten(2)
        whole = [self._by_tile(image, states) for states in (image.states, taps)]
        return torch.cat(whole, dim=-1)[:, :, : self._model.num_patches]

    def _mask(self, image: PartialImage) -> Tensor:
        length = image.states.shape[1] // image.is_real.shape[1]
        return _prepare_aspect_ratio_attention_mask(
            aspect_ratio_mask=image.is_real.long(),
            num_patches=self._model.num_patches,
            target_length=length,
            dtype=image.states.dtype,
        )

    def _between(self, image: PartialImage) -> Tensor:
        """From the local to the global encoder."""
        states = self._by_tile(image, self._model.layernorm_post(image.states))
        placed: Tensor = self._model.post_tile_positional_embedding(states, image.aspect_ratio_ids)
        return placed.flatten(1, 2)

    def _by_tile(self, image: PartialImage, states: Tensor) -> Tensor:
        """[1, all patches, width] to [1, max_num_tiles, padded patches, width]."""
        return states.unflatten(1, (image.is_real.shape[1], -1))


def can_be_cut(model: MllamaVisionModel) -> bool:
    """Whether its parts can be called alone; an offloaded model has hooks on the whole."""
    return not any(hasattr(module, "_hf_hook") for module in model.modules())
