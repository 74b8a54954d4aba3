"""Encodes images: tiles in, the states that cross attention reads out.

Owns normalisation, padding to the vision model's fixed number of tiles, and the bound on how many
images one pass takes. Knows nothing of pools, requests or how an image became tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import MllamaForConditionalGeneration

from .batch import ImageTiles
from .checkpoint import read_json
from .errors import ModelError, StepError

# transformers' defaults, where a checkpoint's file leaves them out
_DEFAULT_MEAN = _DEFAULT_STD = (0.5, 0.5, 0.5)
# every image is padded to the same number of tiles, so a pass of four is already a large one
MAX_IMAGES_PER_PASS = 4


@dataclass(slots=True, frozen=True)
class ImageNormalization:
    """How 8-bit values become pixel values: (value * scale - mean[channel]) / std[channel]."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def table(self) -> Tensor:
        """The pixel value of each channel and 8-bit value, float32 [3, 256].

        Rounded as transformers' processor does it: once after the product, once after the rest.
        """
        scaled = (np.arange(256, dtype=np.float64) * self.scale).astype(np.float32)
        mean, std = (np.array(v, dtype=np.float32)[:, None] for v in (self.mean, self.std))
        return torch.from_numpy((scaled - mean) / std)


def read_normalization(folder: Path) -> ImageNormalization:
    """The normalisation that a checkpoint's folder asks for. Raises ModelError.

    From preprocessor_config.json, or the `image_processor` of a newer processor_config.json.
    """
    file = folder / "preprocessor_config.json"
    if not file.is_file() and (folder / "processor_config.json").is_file():
        settings = read_json(folder / "processor_config.json").get("image_processor", {})
    else:
        settings = read_json(file)
    try:
        return _normalization(settings)
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder}: the image normalisation is unusable: {error}") from None


def _normalization(settings: dict[str, Any]) -> ImageNormalization:
    """Raises ValueError or TypeError for settings that are no numbers, one a channel."""
    rescales, normalizes = settings.get("do_rescale", True), settings.get("do_normalize", True)
    found = ImageNormalization(
        scale=float(settings.get("rescale_factor", 1 / 255)) if rescales else 1.0,
        mean=_channels(settings.get("image_mean", _DEFAULT_MEAN)) if normalizes else (0.0,) * 3,
        std=_channels(settings.get("image_std", _DEFAULT_STD)) if normalizes else (1.0,) * 3,
    )
    if 0.0 in found.std:
        raise ValueError("image_std has a 0")
    return found


def _channels(values: Sequence[float]) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    if len(numbers) != 3:
        raise ValueError(f"{len(numbers)} values for 3 channels")
    return numbers


class VisionEncoder:
    """The vision model and the projector, several images a pass."""

    def __init__(
        self,
        model: MllamaForConditionalGeneration,
        normalization: ImageNormalization,
        device: torch.device,
    ) -> None:
        """`model` must have its taps mended (see `reference.mend_vision`).

        device: where the vision model computes, which is not where offloaded weights lie.
        """
        self._vision = model.model.vision_model
        self._projector = model.model.multi_modal_projector
        self._table = normalization.table().to(device)

    @property
    def max_num_tiles(self) -> int:
        return int(self._vision.max_num_tiles)

    @property
    def tile_size(self) -> int:
        return int(self._vision.image_size)

    def encode(self, images: Sequence[ImageTiles]) -> Tensor:
        """The projected states of the images' real tiles, [num_tiles * num_patches, hidden].

        In the order of the images. Raises StepError if an image does not fit the model.
        """
        for image in images:
            self._check(image)
        passes = [
            self._encode_pass(images[i : i + MAX_IMAGES_PER_PASS])
            for i in range(0, len(images), MAX_IMAGES_PER_PASS)
        ]
        return passes[0] if len(passes) == 1 else torch.cat(passes)

    def _check(self, image: ImageTiles) -> None:
        expected_bytes = image.num_tiles * 3 * self.tile_size**2
        if image.tile_size != self.tile_size or len(image.data) != expected_bytes:
            raise StepError(
                f"an image of {len(image.data)} bytes says {image.num_tiles} tiles of "
                f"{image.tile_size} pixels; the model's tiles have {self.tile_size}"
            )
        if image.num_tiles > self.max_num_tiles:
            raise StepError(
                f"an image has {image.num_tiles} tiles; the model takes {self.max_num_tiles}"
            )
        highest_id = len(self._vision.config.supported_aspect_ratios)
        if image.aspect_ratio_id > highest_id:
            raise StepError(
                f"aspect_ratio_id {image.aspect_ratio_id} is over the model's {highest_id}"
            )

    def _encode_pass(self, images: Sequence[ImageTiles]) -> Tensor:
        device = self._table.device
        num_tiles = torch.tensor([image.num_tiles for image in images])
        is_real = torch.arange(self.max_num_tiles) < num_tiles[:, None]
        ids = torch.tensor([[image.aspect_ratio_id] for image in images])
        states = self._vision(
            pixel_values=self.pixel_values(images),
            aspect_ratio_ids=ids.to(device),
            aspect_ratio_mask=is_real[:, None].long().to(device),
        ).last_hidden_state[:, 0]
        # [num images, max tiles, num_patches, vision output] -> only what the decoder may see
        real = states[is_real.to(device)]
        projected: Tensor = self._projector(real)
        return projected.flatten(0, 1)

    def pixel_values(self, images: Sequence[ImageTiles]) -> Tensor:
        """float32 [num images, 1, max_num_tiles, 3, tile_size, tile_size]; padding tiles are 0."""
        size, table = self.tile_size, self._table
        shape = (len(images), 1, self.max_num_tiles, 3, size, size)
        pixels = torch.zeros(shape, device=table.device)
        for index, image in enumerate(images):
            values = np.frombuffer(image.data, dtype=np.uint8).astype(np.int32)
            tiles = torch.from_numpy(values).to(table.device).view(-1, 3, size * size)
            for channel in range(3):
                looked_up = table[channel].index_select(0, tiles[:, channel].reshape(-1))
                target = pixels[index, 0, : image.num_tiles, channel]
                target.copy_(looked_up.view(-1, size, size))
        return pixels
