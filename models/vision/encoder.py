"""Encodes images: tiles in, the states for cross-attention out.

Owns normalisation, padding to the vision model's fixed number of tiles, the number of images in a
pass, and the image that is encoded in parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import MllamaForConditionalGeneration

from ..batch import ImageTiles, ImageToEncode
from ..checkpoint import read_json
from ..device_copies import Stopwatch, upload
from ..errors import ModelError, StepError
from .layered_encoder import (
    LayeredVision,
    PartialImages,
    is_offloaded,
    loaded_weights,
    padded_patches,
)

# transformers' defaults, for values that a checkpoint's file omits
_DEFAULT_MEAN = _DEFAULT_STD = (0.5, 0.5, 0.5)
# preprocessor_config.json of meta-llama/Llama-3.2-11B-Vision-Instruct
_PUBLISHED = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "rescale_factor": 0.00392156862745098,
}
# Positions of a pass. One published image, of 6,432, fills a GPU and is more than a CPU caches; of
# the smallest models several images share the overhead of a pass.
_PASS_POSITIONS = 2_048
_MAX_IMAGES_PER_PASS = 4

# around a pass of images with the same adapter, by the first of them
AroundPass = Callable[[ImageToEncode], AbstractContextManager[None]]


def as_it_is(image: ImageToEncode) -> AbstractContextManager[None]:
    """An `AroundPass` that changes nothing."""
    return nullcontext()


@dataclass(slots=True, frozen=True)
class ImageNormalization:
    """How 8-bit values become pixel values: (value * scale - mean[channel]) / std[channel]."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def table(self) -> Tensor:
        """The pixel value of each channel and 8-bit value, float32 [3, 256].

        Rounded like transformers' processor: once after the product, once at the end.
        """
        scaled = (np.arange(256, dtype=np.float64) * self.scale).astype(np.float32)
        mean, std = (np.array(v, dtype=np.float32)[:, None] for v in (self.mean, self.std))
        return torch.from_numpy((scaled - mean) / std)


def read_normalization(folder: Path) -> ImageNormalization:
    """The normalisation in a checkpoint's folder. Raises ModelError.

    From the `image_processor` of a newer processor_config.json, else preprocessor_config.json, as
    transformers chooses; without both the values of the published checkpoint.
    """
    plain, combined = folder / "preprocessor_config.json", folder / "processor_config.json"
    settings = read_json(combined).get("image_processor") if combined.is_file() else None
    if settings is None:
        settings = read_json(plain) if plain.is_file() else _PUBLISHED
    try:
        return _normalization(settings)
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder}: the image normalisation is invalid: {error}") from None


def _normalization(settings: dict[str, Any]) -> ImageNormalization:
    """Raises ValueError or TypeError for settings that are not one number for each channel."""
    rescales, normalizes = settings.get("do_rescale", True), settings.get("do_normalize", True)
    found = ImageNormalization(
        scale=float(settings.get("rescale_factor", 1 / 255)) if rescales else 1.0,
        mean=_channels(settings.get("image_mean", _DEFAULT_MEAN)) if normalizes else (0.0,) * 3,
        std=_channels(settings.get("image_std", _DEFAULT_STD)) if normalizes else (1.0,) * 3,
    )
    if 0.0 in found.std:
        raise ValueError("image_std contains 0")
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
        """device: on which the vision model computes."""
        self._vision = model.model.vision_model
        self._projector = model.model.multi_modal_projector
        self._table = normalization.table().to(device)
        self._layered = LayeredVision(self._vision)
        self._partial: PartialImages | None = None
        self._num_together = images_per_pass(self._vision.config)

    @property
    def max_num_tiles(self) -> int:
        return int(self._vision.max_num_tiles)

    @property
    def tile_size(self) -> int:
        return int(self._vision.image_size)

    @property
    def num_layers(self) -> int:
        """In how many parts an image can be encoded; 1 if the weights are loaded for each call."""
        return 1 if is_offloaded(self._vision) else self._layered.num_layers

    def encode(
        self, images: Sequence[ImageToEncode], around: AroundPass = as_it_is
    ) -> Tensor | None:
        """The projected states of the finished images' real tiles; None if no image is finished.

        [num_tiles * num_patches, hidden], in the order of the images. around: entered for each
        pass. Raises StepError if an image does not fit the model, or continues at a layer where no
        step stopped.
        """
        if not images:
            return None
        for entry in images:
            self._check(entry.image)
        with loaded_weights(self._vision):
            passes = [self._encode(part, around) for part in _passes(images, self._num_together)]
        states = [finished for finished in passes if finished is not None]
        return torch.cat(states) if len(states) > 1 else next(iter(states), None)

    def start_watch(self) -> Stopwatch:
        """A watch that measures the encoding without waiting for it."""
        return Stopwatch(self._table.device)

    def _check(self, image: ImageTiles) -> None:
        expected_bytes = image.num_tiles * 3 * self.tile_size**2
        if image.tile_size != self.tile_size or len(image.data) != expected_bytes:
            raise StepError(
                f"an image of {len(image.data)} bytes claims {image.num_tiles} tiles of "
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

    def _encode(self, entries: Sequence[ImageToEncode], around: AroundPass) -> Tensor | None:
        """The projected states of one pass: several whole images, or a part of one."""
        with around(entries[0]):
            return self._run(entries)

    def _run(self, entries: Sequence[ImageToEncode]) -> Tensor | None:
        first = entries[0]
        if first.begin == 0:
            partial = self._begin([entry.image for entry in entries])
        else:
            partial = self._resume(first.begin)
        self._layered.advance(partial, self._layered.num_layers if first.end is None else first.end)
        if first.end is not None:
            self._partial = partial
            return None
        projected: Tensor = self._projector(self._layered.finish(partial))
        return projected

    def _resume(self, layer: int) -> PartialImages:
        """The image that an earlier step left before that layer. Raises StepError."""
        partial, self._partial = self._partial, None
        if partial is None or partial.num_layers != layer:
            raise StepError(f"an image continues at layer {layer}, but no step stopped there")
        return partial

    def _begin(self, images: Sequence[ImageTiles]) -> PartialImages:
        num_tiles = [image.num_tiles for image in images]
        ids = self._aspect_ratio_ids(images)
        return self._layered.begin(self.pixel_values(images), num_tiles, ids)

    def _aspect_ratio_ids(self, images: Sequence[ImageTiles]) -> Tensor:
        ids = [[image.aspect_ratio_id] for image in images]
        return upload(ids, self._table.device, np.int64)

    def pixel_values(self, images: Sequence[ImageTiles]) -> Tensor:
        """float32 [num images, max_num_tiles, 3, tile_size, tile_size]; padding tiles are 0."""
        size, table = self.tile_size, self._table
        shape = (len(images), self.max_num_tiles, 3, size, size)
        pixels = torch.zeros(shape, device=table.device)
        for index, image in enumerate(images):
            values = np.frombuffer(image.data, dtype=np.uint8).copy()  # torch wants it writable
            # the device widens the values to indices: four times the bytes
            tiles = upload(values, table.device).int().view(-1, 3, size * size)
            for channel in range(3):
                looked_up = table[channel].index_select(0, tiles[:, channel].reshape(-1))
                target = pixels[index, : image.num_tiles, channel]
                target.copy_(looked_up.view(-1, size, size))
        return pixels


def images_per_pass(vision: Any) -> int:
    """How many whole images are encoded together: more only take more memory.

    vision: the configuration of the vision model.
    """
    num_patches = (vision.image_size // vision.patch_size) ** 2 + 1
    positions = int(vision.max_num_tiles) * padded_patches(num_patches)
    return max(1, min(_MAX_IMAGES_PER_PASS, _PASS_POSITIONS // positions))


def _passes(
    images: Sequence[ImageToEncode], num_together: int
) -> Iterator[Sequence[ImageToEncode]]:
    """The images in order, cut into passes.

    Neighbouring whole images with the same adapter share a pass.
    """
    begin = 0
    while begin < len(images):
        end = begin + 1
        while (
            end < min(len(images), begin + num_together)
            and _is_whole(images[begin])
            and _is_whole(images[end])
            and images[begin].adapter == images[end].adapter
        ):
            end += 1
        yield images[begin:end]
        begin = end


def _is_whole(image: ImageToEncode) -> bool:
    """All of its layers run in this step."""
    return image.begin == 0 and image.end is None
