"""Headers and pixels: what a picture is read as, and what is refused before it is decoded."""

from __future__ import annotations

import contextlib
import io
import random
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.pictures import HEADERS, SETTINGS, TILING, encoded, noise, picture, png_chunk

from vlmserve.models.batch import ImageTiles
from vlmserve.server.images.decoding import content_hash, decode, to_rgb
from vlmserve.server.images.header import ImageHeader, check_header, read_header
from vlmserve.server.images.settings import ImageError, ImageSettings
from vlmserve.server.images.tiling import TilingConfig, cut


def decoded(data: bytes, settings: ImageSettings = SETTINGS) -> ImageTiles:
    """What a child does, without the child."""
    return decode(data, settings, TILING, None)


def first_pixel(tiles: ImageTiles) -> tuple[int, ...]:
    pixels = np.frombuffer(tiles.data, np.uint8).reshape(-1, 3, tiles.tile_size, tiles.tile_size)
    return tuple(int(value) for value in pixels[0, :, 0, 0])


def with_png_chunk(data: bytes, kind: bytes, body: bytes) -> bytes:
    """A PNG with one more chunk after its header."""
    return data[:33] + png_chunk(kind, body) + data[33:]


@pytest.mark.parametrize(("data", "header"), HEADERS)
def test_header_is_read_as_pillow_reads_it(data: bytes, header: ImageHeader) -> None:
    assert read_header(data) == header
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size) == (header.format, (header.width, header.height))


def test_multi_picture_jpeg_is_a_jpeg() -> None:
    data = encoded(picture(), "MPO", save_all=True, append_images=[picture()])
    assert read_header(data) == ImageHeader("JPEG", 70, 50)
    assert decoded(data).num_tiles >= 1


def test_padding_between_jpeg_segments_is_read_over() -> None:
    data = encoded(picture(), "JPEG")
    assert read_header(data[:2] + b"\xff" * 200_000 + data[2:]) == ImageHeader("JPEG", 70, 50)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\x00\x00\x00\x18ftypheic" + bytes(40), "HEIC.*convert"),
        (b"\x00\x00\x00\x18ftypmif1" + bytes(40), "HEIC.*convert"),
        (b"\x00\x00\x00\x18ftypavif" + bytes(40), "AVIF.*convert"),
        (b"\x00\x00\x00\x18ftypisom" + bytes(40), "unknown format"),
        (encoded(picture(), "TIFF"), "TIFF"),
        (encoded(picture(), "BMP"), "BMP"),
        (encoded(picture(), "ICO"), "ICO"),
        (encoded(picture(), "PPM"), "unknown format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"\n<!DOCTYPE html><html>", "HTML"),
        (b"%PDF-1.7", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "unknown format"),
        (b"", "empty"),
        (b"\x00" * 100, "unknown format"),
    ],
)
def test_other_formats_are_refused_by_name(data: bytes, name: str) -> None:
    with pytest.raises(ImageError, match=name):
        read_header(data)


@pytest.mark.parametrize("data", [data for data, _ in HEADERS])
def test_header_cut_anywhere_is_an_image_error(data: bytes) -> None:
    for length in range(min(len(data), 200)):
        try:
            header = read_header(data[:length])
        except ImageError:
            continue
        assert (header.width, header.height) == (70, 50)


def test_header_of_random_bytes_is_an_image_error_or_a_header() -> None:
    rng = random.Random(5)
    magics = [
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"RIFF0000WEBPVP8 ",
        b"GIF89a",
        b"RIFF0000WEBP",
    ]
    for _ in range(2000):
        data = rng.choice(magics) + rng.randbytes(rng.randint(0, 60))
        with contextlib.suppress(ImageError):
            assert read_header(data).format in ("JPEG", "PNG", "WEBP", "GIF")


@pytest.mark.parametrize("filler", [b"\xff\xd0", b"\xff\xe0\x00\x02", b"\xff\xe0\x00\x00", b"\xff"])
def test_endless_jpeg_segments_are_given_up_on(filler: bytes) -> None:
    """Twenty megabytes of them; walking all would hold the worker's loop for seconds."""
    data = b"\xff\xd8\xff\xe0\x00\x02" + filler * (20_000_000 // len(filler))
    start = time.perf_counter()
    with pytest.raises(ImageError):
        read_header(data)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (ImageHeader("PNG", 5001, 5000), "25,000,000"),
        (ImageHeader("WEBP", 5001, 5000), "25,000,000"),
        (ImageHeader("JPEG", 5001, 5000, True), "25,000,000"),
        (ImageHeader("JPEG", 10_001, 10_000), "100,000,000"),
        (ImageHeader("PNG", 16_385, 200), "16384"),
        (ImageHeader("PNG", 200, 16_385), "16384"),
        (ImageHeader("PNG", 201, 1), "200 times"),
        (ImageHeader("PNG", 10, 2001), "200 times"),
        (ImageHeader("PNG", 0, 10), "no content"),
        (ImageHeader("JPEG", 10, 0), "no content"),
    ],
)
def test_sizes_over_a_limit_are_refused(header: ImageHeader, problem: str) -> None:
    with pytest.raises(ImageError, match=problem):
        check_header(header, SETTINGS)


@pytest.mark.parametrize(
    "header",
    [
        ImageHeader("PNG", 5000, 5000), ImageHeader("JPEG", 10_000, 10_000),
        ImageHeader("GIF", 16_384, 100), ImageHeader("PNG", 1, 200), ImageHeader("PNG", 1, 1),
    ],
)  # fmt: skip
def test_sizes_at_a_limit_are_taken(header: ImageHeader) -> None:
    check_header(header, SETTINGS)


def test_tiles_are_those_of_the_picture() -> None:
    image = picture(90, 130)
    tiles = decoded(encoded(image))
    assert tiles.data == cut(image, TILING).data
    assert tiles.num_tiles == len(tiles.data) // (3 * 56 * 56)


MODES = {
    "grey": Image.fromarray(noise(20, 10, 1)),
    "bilevel": Image.fromarray(noise(20, 10, 1)).convert("1"),
    "grey with alpha": Image.fromarray(noise(20, 10, 4)).convert("LA"),
    "RGBA": Image.fromarray(noise(20, 10, 4)),
    "palette": picture(20, 10).quantize(16),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb_as_transformers_converts_it(name: str) -> None:
    from transformers.image_transforms import convert_to_rgb

    with Image.open(io.BytesIO(encoded(MODES[name]))) as image:
        image.load()
        assert np.array_equal(
            np.asarray(to_rgb(image)), np.asarray(convert_to_rgb(image, return_numpy=True))
        )


def test_transparent_parts_are_white_even_of_palettes_and_large_pictures() -> None:
    palette = Image.new("P", (20, 1000), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.paste(0, (0, 900, 20, 1000))
    pixels = np.asarray(to_rgb(Image.open(io.BytesIO(encoded(palette, transparency=0)))))
    assert (pixels[:900] == [255, 0, 0]).all()
    assert (pixels[900:] == 255).all()
    keyed = Image.new("RGB", (4, 4), (1, 2, 3))
    data = encoded(keyed, transparency=(1, 2, 3))
    assert (np.asarray(to_rgb(Image.open(io.BytesIO(data)))) == 255).all()


def test_sixteen_bit_grey_keeps_its_brightness() -> None:
    """A plain conversion clips everything above 255 to white."""
    grey = Image.fromarray(np.full((8, 8), 0x4080, dtype=np.uint16))
    assert first_pixel(decoded(encoded(grey))) == (0x40, 0x40, 0x40)


def test_cmyk_jpeg_is_shown_in_its_colours() -> None:
    red = Image.new("CMYK", (64, 64), (0, 255, 255, 0))
    pixel = first_pixel(decoded(encoded(red, "JPEG", quality=95)))
    assert pixel[0] > 200
    assert max(pixel[1:]) < 60


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (3, 2), (82, 16_384)])
def test_extreme_sizes_are_decoded(size: tuple[int, int]) -> None:
    tiles = decoded(encoded(Image.new("RGB", size, (9, 8, 7))))
    assert first_pixel(tiles) == (9, 8, 7)


def test_side_of_8192_by_one_is_refused_kindly() -> None:
    with pytest.raises(ImageError, match="200 times"):
        decoded(encoded(Image.new("RGB", (1, 8192))))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
def test_exif_rotation_is_applied(format: str, orientation: int) -> None:
    """A picture stored turned, with the tag that says how, is the upright picture again."""
    upright = Image.new("RGB", (112, 56), "white")
    upright.paste((255, 0, 0), (0, 0, 56, 28))  # top left red
    upright.paste((0, 0, 255), (0, 28, 56, 56))  # bottom left blue
    back = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    stored = upright if back is None else upright.transpose(back)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {"quality": 95, "subsampling": 0}
    tiles = decoded(encoded(stored, format, exif=exif, **options))
    expected = cut(upright, TILING)
    assert tiles.aspect_ratio_id == expected.aspect_ratio_id
    ours, theirs = (np.frombuffer(t.data, np.uint8).astype(int) for t in (tiles, expected))
    assert np.abs(ours - theirs).max() < 60 if format == "JPEG" else np.array_equal(ours, theirs)


@pytest.mark.parametrize("exif", [b"Exif\0\0" + b"\xff" * 50, b"Exif\0\0II*\0" + b"\xff" * 4, b"x"])
def test_broken_exif_turns_nothing(exif: bytes) -> None:
    image = picture()
    assert decoded(encoded(image, "PNG", exif=exif)).data == cut(image, TILING).data


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animation_gives_its_first_frame(format: str) -> None:
    first, rest = Image.new("RGB", (40, 40), (255, 0, 0)), Image.new("RGB", (40, 40), (0, 0, 255))
    data = encoded(first, format, save_all=True, append_images=[rest] * 50)
    red, green, blue = first_pixel(decoded(data))
    assert red > 240
    assert max(green, blue) < 15


def test_large_jpeg_is_decoded_at_a_fraction_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmserve.server.images.decoding.DRAFT_PIXELS", 10_000)
    half = Image.new("RGB", (400, 200), "white")
    half.paste((0, 0, 0), (0, 0, 200, 200))
    sizes: list[tuple[int, int]] = []

    def noting_cut(image: Image.Image, *rest: Any) -> ImageTiles:
        sizes.append(image.size)
        return cut(image, *rest)

    monkeypatch.setattr("vlmserve.server.images.decoding.cut", noting_cut)
    tiles = decoded(encoded(half, "JPEG"))
    assert sizes == [(100, 50)]
    assert max(first_pixel(tiles)) < 10
    assert tiles.aspect_ratio_id == cut(half, TILING).aspect_ratio_id


def test_row_36_content_hash_differs_with_bytes_size_and_settings_only() -> None:
    """Same bytes, other size, mode or processor: another cache key."""
    data = encoded(picture())
    hashes = {
        content_hash(data, TILING, None), content_hash(data + b"x", TILING, None),
        content_hash(data, TILING, 1), content_hash(data, TilingConfig(112, 4), None),
        content_hash(data, TilingConfig(56, 2), None),
        content_hash(data, TilingConfig(56, 4, 3), None),
    }  # fmt: skip
    assert len(hashes) == 6
    assert content_hash(data, TILING, 4) == content_hash(data, TILING, None)
    assert {len(value) for value in hashes} == {32}


def test_row_36_pixels_alone_are_no_cache_key() -> None:
    """30 x 100 and 100 x 30 pixels of the same bytes once had the same key elsewhere."""
    pixels = noise(30, 100)
    tall, wide = Image.fromarray(pixels), Image.fromarray(pixels.reshape(30, 100, 3))
    assert decoded(encoded(tall)).content_hash != decoded(encoded(wide)).content_hash
