"""Turns an RGB image into the tiles that Mllama sees: resize, pad, split.

Equal, bit for bit, to transformers' MllamaImageProcessorPil before rescaling and normalising
(which the engine does); padding tiles are dropped. Owns the choice of the tile grid and its id.
Knows nothing of files, formats or processes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from ...models.batch import ImageTiles

BILINEAR = int(Image.Resampling.BILINEAR)


@dataclass(frozen=True, slots=True)
class TileGrid:
    """The number of tiles of an image, in rows and columns."""

    rows: int
    columns: int

    @property
    def num_tiles(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Size:
    """Pixels, height first as in arrays."""

    height: int
    width: int


@dataclass(frozen=True, slots=True)
class TilingConfig:
    """The settings of a checkpoint's image processor that decide the tiles.

    resample: Pillow's number of the filter (2 is bilinear). The defaults are those of
    transformers' MllamaImageProcessor for settings that a checkpoint does not contain.
    """

    tile_size: int = 224
    max_image_tiles: int = 4
    resample: int = BILINEAR

    def __post_init__(self) -> None:
        if self.tile_size < 1 or self.max_image_tiles < 1:
            raise ValueError(
                f"tile size {self.tile_size} and max_image_tiles {self.max_image_tiles} must both "
                "be at least 1: see the checkpoint's preprocessor_config.json"
            )
        Image.Resampling(self.resample)

    @classmethod
    def from_checkpoint(cls, folder: str | Path) -> TilingConfig:
        """The tiling of the checkpoint in `folder`.

        Reads preprocessor_config.json, or the `image_processor` part of
        processor_config.json, where transformers 5 writes it; without both the sizes in
        config.json. Raises FileNotFoundError if all are missing, ValueError if Mllama's
        processor does not accept the settings.
        """
        root = Path(folder)
        combined = root / "processor_config.json"
        if combined.is_file():
            nested = json.loads(combined.read_text("utf-8")).get("image_processor")
            if nested is not None:
                return cls.from_dict(nested)
        plain = root / "preprocessor_config.json"
        if plain.is_file():
            return cls.from_dict(json.loads(plain.read_text("utf-8")))
        if (root / "config.json").is_file():
            vision = json.loads((root / "config.json").read_text("utf-8")).get("vision_config")
            if vision and "image_size" in vision:
                return cls(vision["image_size"], vision.get("max_num_tiles", 4))
        raise FileNotFoundError(
            f"{root} has no preprocessor_config.json and no image_processor in "
            "processor_config.json: the tile size of the checkpoint is unknown"
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TilingConfig:
        """The tiling that a processor's settings (as in preprocessor_config.json) describe."""
        size = values.get("size", {"height": 224, "width": 224})
        sides = {size} if isinstance(size, int) else {size.get("height"), size.get("width")}
        side = sides.pop()
        if sides or not isinstance(side, int):
            raise ValueError(f"image processor size is {size!r}: height and width must be equal")
        resample = values.get("resample")
        return cls(
            tile_size=side,
            max_image_tiles=values.get("max_image_tiles", 4),
            resample=BILINEAR if resample is None else resample,
        )

    def fingerprint(self, max_tiles: int | None) -> bytes:
        """Bytes that differ whenever the same image would give other tiles."""
        return json.dumps([asdict(self), self.tile_limit(max_tiles)], sort_keys=True).encode()

    def tile_limit(self, max_tiles: int | None) -> int:
        """The maximum number of tiles of an image: the checkpoint's limit or less, at least 1."""
        if max_tiles is None:
            return self.max_image_tiles
        return max(1, min(max_tiles, self.max_image_tiles))


def cut(
    image: Image.Image,
    config: TilingConfig,
    max_tiles: int | None = None,
    content_hash: bytes = b"",
) -> ImageTiles:
    """The real tiles of an RGB image, uint8 [num_tiles, 3, tile_size, tile_size].

    max_tiles limits the choice of grids; aspect_ratio_id is always that of the checkpoint's
    own table. Raises ValueError for a mode other than RGB.
    Source: transformers 5.23, models/mllama/image_processing_pil_mllama.py.
    """
    if image.mode != "RGB":
        raise ValueError(f"image mode is {image.mode}: convert it to RGB before cutting")
    tile_size = config.tile_size
    grid = choose_grid(image.height, image.width, config.tile_limit(max_tiles), tile_size)
    size = fit_to_grid(image.height, image.width, grid, tile_size)
    resample = Image.Resampling(config.resample)
    canvas = Image.new("RGB", (grid.columns * tile_size, grid.rows * tile_size))
    canvas.paste(image.resize((size.width, size.height), resample=resample), (0, 0))
    return ImageTiles(
        data=b"".join(_planes(canvas, grid, tile_size)),
        num_tiles=grid.num_tiles,
        tile_size=tile_size,
        aspect_ratio_id=aspect_ratio_id(grid, config.max_image_tiles),
        content_hash=content_hash,
    )


def _planes(canvas: Image.Image, grid: TileGrid, side: int) -> Iterator[bytes]:
    """The colour planes of each tile, by rows."""
    for row, column in product(range(grid.rows), range(grid.columns)):
        left, top = column * side, row * side
        for plane in canvas.crop((left, top, left + side, top + side)).split():
            yield plane.tobytes()


@cache
def supported_grids(max_tiles: int) -> tuple[TileGrid, ...]:
    """All grids of at most `max_tiles` tiles, in the order of their ids."""
    sides = range(1, max_tiles + 1)
    return tuple(TileGrid(a, b) for a in sides for b in sides if a * b <= max_tiles)


def aspect_ratio_id(grid: TileGrid, max_image_tiles: int) -> int:
    """The vision encoder's id of a grid: its position in the table, from 1."""
    return supported_grids(max_image_tiles).index(grid) + 1


def choose_grid(height: int, width: int, max_tiles: int, tile_size: int) -> TileGrid:
    """The grid that enlarges the image least, else shrinks it least; of equals the smallest."""
    grids = supported_grids(max_tiles)
    scales = [
        min(grid.rows * tile_size / height, grid.columns * tile_size / width) for grid in grids
    ]
    enlarging = [scale for scale in scales if scale >= 1]
    chosen = min(enlarging) if enlarging else max(scales)
    best = [grid for grid, scale in zip(grids, scales, strict=True) if scale == chosen]
    return min(best, key=lambda grid: grid.num_tiles)


def fit_to_grid(height: int, width: int, grid: TileGrid, tile_size: int) -> Size:
    """The size of the image inside its grid: same proportions, at least one tile if possible."""
    target_width = min(max(width, tile_size), grid.columns * tile_size)
    target_height = min(max(height, tile_size), grid.rows * tile_size)
    scale_height = target_height / height
    scale_width = target_width / width
    if scale_width < scale_height:
        return Size(min(math.floor(height * scale_width) or 1, target_height), target_width)
    return Size(target_height, min(math.floor(width * scale_height) or 1, target_width))
