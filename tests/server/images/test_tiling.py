"""Our tiling gives the tiles of transformers' Mllama processor, bit for bit."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.mllama.image_processing_pil_mllama import (
    MllamaImageProcessorPil,
    get_all_supported_aspect_ratios,
)

from vlmserve.server.images.tiling import TileGrid, TilingConfig, cut, supported_grids

TILE_SIZES = (56, 448, 560)
FIXED_SIZES = [
    (1, 1), (1, 200), (200, 1), (3, 500), (56, 56), (55, 57), (57, 55), (112, 112), (113, 112),
    (224, 224), (448, 448), (449, 448), (560, 560), (561, 560), (1120, 1120), (1121, 1119),
    (640, 480), (480, 640), (1920, 1080), (333, 1000), (1680, 560), (2240, 560), (560, 2240),
]  # fmt: skip


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture in which every pixel counts."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def reference(image: Image.Image, tile_size: int, max_tiles: int) -> tuple[np.ndarray, int]:
    """transformers' real tiles [num_tiles, 3, tile, tile] as float32, and their grid's id."""
    processor = MllamaImageProcessorPil(
        size={"height": tile_size, "width": tile_size}, max_image_tiles=max_tiles,
        do_rescale=False, do_normalize=False,
    )  # fmt: skip
    out = processor(image)
    num_tiles = out["num_tiles"][0][0]
    return np.asarray(out["pixel_values"])[0, 0, :num_tiles], int(out["aspect_ratio_ids"][0][0])


def assert_equal_to_reference(image: Image.Image, tile_size: int, max_tiles: int) -> None:
    tiles = cut(image, TilingConfig(tile_size=tile_size, max_image_tiles=max_tiles))
    expected, expected_id = reference(image, tile_size, max_tiles)
    ours = np.frombuffer(tiles.data, np.uint8).reshape(tiles.num_tiles, 3, tile_size, tile_size)
    assert ours.shape == expected.shape, image.size
    assert np.array_equal(ours.astype(np.float32), expected), image.size
    assert tiles.aspect_ratio_id == expected_id, image.size
    assert tiles.tile_size == tile_size


@pytest.mark.parametrize("max_tiles", [1, 2, 3, 4])
@pytest.mark.parametrize("tile_size", TILE_SIZES)
def test_tiles_equal_those_of_transformers_at_chosen_sizes(tile_size: int, max_tiles: int) -> None:
    # The large tiles over every third size: the whole table takes a minute.
    sizes = FIXED_SIZES if tile_size == 56 else FIXED_SIZES[max_tiles % 3 :: 3]
    for width, height in sizes:
        assert_equal_to_reference(noise(width, height), tile_size, max_tiles)


def test_tiles_equal_those_of_transformers_at_random_sizes() -> None:
    rng = random.Random(7)
    for seed in range(120):
        image = noise(rng.randint(1, 300), rng.randint(1, 300), seed)
        assert_equal_to_reference(image, 56, rng.randint(1, 4))


@pytest.mark.slow
def test_tiles_equal_those_of_transformers_at_many_random_sizes() -> None:
    rng = random.Random(8)
    for seed in range(400):
        top = rng.choice([60, 600, 2500])
        image = noise(rng.randint(1, top), rng.randint(1, top), seed)
        assert_equal_to_reference(image, rng.choice(TILE_SIZES), rng.randint(1, 4))


def test_filter_of_the_checkpoint_is_used() -> None:
    image = noise(300, 250)
    processor = MllamaImageProcessorPil(
        size={"height": 56, "width": 56}, resample=Image.Resampling.BICUBIC,
        do_rescale=False, do_normalize=False,
    )  # fmt: skip
    expected = np.asarray(processor(image)["pixel_values"])[0, 0]
    config = TilingConfig(tile_size=56, resample=int(Image.Resampling.BICUBIC))
    tiles = cut(image, config)
    ours = np.frombuffer(tiles.data, np.uint8).reshape(-1, 3, 56, 56)
    assert np.array_equal(ours.astype(np.float32), expected[: tiles.num_tiles])
    assert tiles.data != cut(image, TilingConfig(tile_size=56)).data


@pytest.mark.parametrize("max_tiles", [1, 2, 3, 4, 6, 9])
def test_grids_stand_in_the_order_of_transformers(max_tiles: int) -> None:
    expected = tuple(TileGrid(a, b) for a, b in get_all_supported_aspect_ratios(max_tiles))
    assert supported_grids(max_tiles) == expected


def test_fewer_tiles_keep_the_ids_of_the_checkpoints_table() -> None:
    tall = noise(60, 200)
    config = TilingConfig(tile_size=56, max_image_tiles=4)
    assert cut(tall, config).num_tiles == 4
    two = cut(tall, config, max_tiles=2)
    assert two.num_tiles == 2
    # 2 rows, 1 column: the fifth grid of four tiles' table (the third of two tiles' table)
    assert two.aspect_ratio_id == 5
    assert cut(tall, config, max_tiles=1).aspect_ratio_id == 1
    assert cut(tall, config, max_tiles=99) == cut(tall, config)


def test_other_modes_are_refused_before_cutting() -> None:
    with pytest.raises(ValueError, match="RGB"):
        cut(Image.new("L", (4, 4)), TilingConfig())


def test_config_is_read_from_either_file_of_a_checkpoint(tmp_path: Path) -> None:
    processor = MllamaImageProcessorPil(size={"height": 448, "width": 448}, max_image_tiles=3)
    processor.save_pretrained(tmp_path)
    assert TilingConfig.from_checkpoint(tmp_path) == TilingConfig(448, 3)

    combined = tmp_path / "combined"
    combined.mkdir()
    nested = {"image_processor": {"size": {"height": 56, "width": 56}, "max_image_tiles": 2}}
    (combined / "processor_config.json").write_text(json.dumps(nested))
    assert TilingConfig.from_checkpoint(combined) == TilingConfig(56, 2)


def test_checkpoint_without_image_processor_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="preprocessor_config"):
        TilingConfig.from_checkpoint(tmp_path)


@pytest.mark.parametrize("size", [{"height": 4, "width": 5}, {"shortest_edge": 4}])
def test_tiles_that_are_not_square_are_refused(size: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="equal"):
        TilingConfig.from_dict({"size": size})


def test_fingerprint_changes_with_everything_that_changes_tiles() -> None:
    base = TilingConfig(56, 4)
    prints = {
        base.fingerprint(None), base.fingerprint(1), TilingConfig(112, 4).fingerprint(None),
        TilingConfig(56, 3).fingerprint(None), TilingConfig(56, 4, 3).fingerprint(None),
    }  # fmt: skip
    assert len(prints) == 5
    assert base.fingerprint(4) == base.fingerprint(None) == base.fingerprint(7)
