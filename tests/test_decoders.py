"""Decoding: hostile, broken and odd pictures cost one answer, never the pool."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import random
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image
from support.pictures import SETTINGS, TILING, encoded, noise, picture, png_chunk, png_of_zeros

from vlmserve.models.batch import ImageTiles
from vlmserve.server.images.decoder_child import DecoderConfig
from vlmserve.server.images.decoders import DecoderPool
from vlmserve.server.images.decoding import content_hash, decode, to_rgb
from vlmserve.server.images.header import ImageHeader, check_header, read_header
from vlmserve.server.images.settings import ImageError, ImageSettings, PoolClosed
from vlmserve.server.images.tiling import TilingConfig, cut

CHILD = "vlmserve.server.images.decoder_child"


def decoded(data: bytes, settings: ImageSettings = SETTINGS) -> ImageTiles:
    """What a child does, without the child."""
    return decode(data, settings, TILING, None)


def first_pixel(tiles: ImageTiles) -> tuple[int, ...]:
    pixels = np.frombuffer(tiles.data, np.uint8).reshape(-1, 3, tiles.tile_size, tiles.tile_size)
    return tuple(int(value) for value in pixels[0, :, 0, 0])


def with_png_chunk(data: bytes, kind: bytes, body: bytes) -> bytes:
    """A PNG with one more chunk after its header."""
    return data[:33] + png_chunk(kind, body) + data[33:]


def with_pool(
    use: Callable[[DecoderPool], Awaitable[None]], settings: ImageSettings = SETTINGS
) -> None:
    async def run() -> None:
        async with asyncio.timeout(60), DecoderPool(settings, TILING) as pool:
            await use(pool)

    asyncio.run(run())


async def wait_until(is_true: Callable[[], bool]) -> None:
    """A safety deadline, not a measurement."""
    async with asyncio.timeout(30):
        while not is_true():  # noqa: ASYNC110  # processes have no event to wait for
            await asyncio.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def read_proc(pid: int, name: str) -> bytes:
    return Path(f"/proc/{pid}/{name}").read_bytes()


# ---- headers


HEADERS = [
    (encoded(picture(70, 50), "PNG"), ImageHeader("PNG", 70, 50)),
    (encoded(picture(70, 50), "JPEG"), ImageHeader("JPEG", 70, 50)),
    (encoded(picture(70, 50), "JPEG", progressive=True), ImageHeader("JPEG", 70, 50, True)),
    (encoded(picture(70, 50), "WEBP"), ImageHeader("WEBP", 70, 50)),
    (encoded(picture(70, 50), "WEBP", lossless=True), ImageHeader("WEBP", 70, 50)),
    (encoded(Image.fromarray(noise(70, 50, 4)), "WEBP"), ImageHeader("WEBP", 70, 50)),
    (encoded(picture(70, 50), "GIF"), ImageHeader("GIF", 70, 50)),
    (
        encoded(picture(70, 50), "JPEG", exif=b"Exif\0\0" + bytes(60_000)),
        ImageHeader("JPEG", 70, 50),
    ),
]


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
        (b"\x00\x00\x00\x18ftypisom" + bytes(40), "no known format"),
        (encoded(picture(), "TIFF"), "TIFF"),
        (encoded(picture(), "BMP"), "BMP"),
        (encoded(picture(), "ICO"), "ICO"),
        (encoded(picture(), "PPM"), "no known format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"\n<!DOCTYPE html><html>", "HTML"),
        (b"%PDF-1.7", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "no known format"),
        (b"", "empty"),
        (b"\x00" * 100, "no known format"),
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


# ---- pixels


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


def test_content_hash_differs_with_bytes_size_and_settings_only() -> None:
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


def test_pixels_alone_are_no_cache_key() -> None:
    """30 x 100 and 100 x 30 pixels of the same bytes once had the same key elsewhere."""
    pixels = noise(30, 100)
    tall, wide = Image.fromarray(pixels), Image.fromarray(pixels.reshape(30, 100, 3))
    assert decoded(encoded(tall)).content_hash != decoded(encoded(wide)).content_hash


# ---- the pool


BOMBS = {
    "177 megapixels in 22 kB": png_of_zeros(13_300, 13_300),
    "header says more than there is": encoded(picture())[:16]
    + struct.pack(">II", 4000, 4000)
    + encoded(picture())[24:],
    "text bomb": with_png_chunk(
        encoded(picture()), b"zTXt", b"c\0\0" + zlib.compress(bytes(50_000_000), 9)
    ),
    "profile bomb": with_png_chunk(
        encoded(picture()), b"iCCP", b"c\0\0" + zlib.compress(bytes(50_000_000), 9)
    ),
    "pixels end early": encoded(picture(300, 300))[:20_000],
    "JPEG ends early": encoded(picture(300, 300), "JPEG")[:9000],
    "GIF ends early": encoded(picture(300, 300), "GIF")[:9000],
    "WebP ends early": encoded(picture(300, 300), "WEBP")[:4000],
    "HEIC": b"\x00\x00\x00\x18ftypheic" + bytes(100),
    "empty": b"",
}  # fmt: skip


def test_hostile_and_broken_pictures_are_refused_and_leave_the_children_alive() -> None:
    async def use(pool: DecoderPool) -> None:
        pids = pool.pids
        for name, data in BOMBS.items():
            if name not in ("text bomb", "profile bomb"):
                with pytest.raises(ImageError, match=r"^image "):
                    await pool.decode(data)
                continue
            with contextlib.suppress(ImageError):
                assert (await pool.decode(data)).data == cut(picture(), TILING).data
        assert pool.pids == pids
        assert (await pool.decode(encoded(picture()))).data == cut(picture(), TILING).data

    with_pool(use)


def test_pictures_with_flipped_bytes_never_end_a_child() -> None:
    """A small seeded sample of a fuzzer over all four formats."""
    rng = random.Random(11)
    seeds = [data for data, _ in HEADERS[:7]]

    async def use(pool: DecoderPool) -> None:
        pids = pool.pids
        for _ in range(200):
            data = bytearray(rng.choice(seeds))
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            with contextlib.suppress(ImageError):
                assert (await pool.decode(bytes(data))).num_tiles > 0
        assert pool.pids == pids

    with_pool(use)


def test_memory_of_a_child_is_capped() -> None:
    """A picture within every limit, but over what this child may take, is a plain refusal."""
    settings = ImageSettings(decoder_memory_bytes=32 * 1024 * 1024)

    async def use(pool: DecoderPool) -> None:
        pids = pool.pids
        with pytest.raises(ImageError, match=r"memory|broken"):
            await pool.decode(encoded(Image.new("RGB", (4900, 4900))))
        assert pool.pids == pids
        assert (await pool.decode(encoded(picture()))).num_tiles > 0

    with_pool(use, settings)


@pytest.mark.slow
def test_rotated_jpeg_of_100_megapixels_takes_under_200_megabytes() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noisy = Image.fromarray(noise(1250, 1250)).resize((10_000, 10_000))
    data = encoded(noisy, "JPEG", quality=60, exif=exif)
    del noisy

    async def use(pool: DecoderPool) -> None:
        assert (await pool.decode(data)).num_tiles == 4
        peaks = [
            int(line.split()[1])
            for pid in pool.pids
            for line in read_proc(pid, "status").decode().splitlines()
            if line.startswith("VmHWM")
        ]
        assert len(peaks) == 2
        assert max(peaks) < 200_000  # kB

    with_pool(use, ImageSettings(max_image_bytes=len(data), decode_timeout_s=25.0))


def test_max_tiles_reaches_the_child() -> None:
    async def use(pool: DecoderPool) -> None:
        data = encoded(picture(60, 200))
        full, one = await pool.decode(data), await pool.decode(data, 1)
        assert (full.num_tiles, one.num_tiles) == (4, 1)
        assert full.content_hash == content_hash(data, TILING, None)
        assert one.content_hash == content_hash(data, TILING, 1)

    with_pool(use)


def test_killed_child_is_replaced_and_only_its_picture_fails() -> None:
    async def use(pool: DecoderPool) -> None:
        data = encoded(picture())
        before = pool.pids
        for pid in before:
            os.kill(pid, signal.SIGSTOP)
        jobs = [asyncio.create_task(pool.decode(data)) for _ in range(2)]
        await asyncio.sleep(0.05)
        os.kill(before[1], signal.SIGCONT)
        os.kill(before[0], signal.SIGKILL)
        results = await asyncio.gather(*jobs, return_exceptions=True)
        assert {type(result) for result in results} == {ImageError, ImageTiles}
        await wait_until(lambda: len(pool.pids) == 2 and before[0] not in pool.pids)
        await asyncio.gather(*(pool.decode(data) for _ in range(4)))
        assert not is_running(before[0])

    with_pool(use)


def test_hung_child_is_killed_at_its_deadline_while_others_go_on() -> None:
    settings = ImageSettings(decode_timeout_s=2.0)

    async def use(pool: DecoderPool) -> None:
        data = encoded(picture())
        hung = pool.pids[0]
        os.kill(hung, signal.SIGSTOP)
        results = await asyncio.gather(
            *(pool.decode(data) for _ in range(6)), return_exceptions=True
        )
        failures = [result for result in results if isinstance(result, ImageError)]
        assert ["2 s" in failure.message for failure in failures] == [True]
        assert sum(isinstance(result, ImageTiles) for result in results) == 5
        await wait_until(lambda: len(pool.pids) == 2 and hung not in pool.pids)
        assert not is_running(hung)

    with_pool(use, settings)


def test_child_that_died_while_idle_costs_no_picture() -> None:
    async def use(pool: DecoderPool) -> None:
        victims = pool.pids
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        await wait_until(lambda: not pool.pids)
        assert (await pool.decode(encoded(picture()))).num_tiles > 0
        assert not set(victims) & set(pool.pids)

    with_pool(use)


def test_cancelled_decodes_leave_every_answer_with_its_question() -> None:
    async def use(pool: DecoderPool) -> None:
        rng = random.Random(2)
        images = [picture(rng.randint(1, 200), rng.randint(1, 200)) for _ in range(60)]
        jobs = [asyncio.create_task(pool.decode(encoded(image))) for image in images]
        for index, job in enumerate(jobs):
            if index % 3 == 0:
                await asyncio.sleep(rng.random() * 0.004)
                job.cancel()
        results = await asyncio.gather(*jobs, return_exceptions=True)
        for image, result in zip(images, results, strict=True):
            if isinstance(result, ImageTiles):
                assert result.data == cut(image, TILING).data
            else:
                assert isinstance(result, asyncio.CancelledError)
        assert sum(isinstance(result, ImageTiles) for result in results) >= 40

    with_pool(use)


def test_cancelled_decode_of_a_hung_child_frees_it_at_the_deadline() -> None:
    settings = ImageSettings(decode_timeout_s=2.0)

    async def use(pool: DecoderPool) -> None:
        before = pool.pids
        for pid in before:
            os.kill(pid, signal.SIGSTOP)
        jobs = [asyncio.create_task(pool.decode(encoded(picture()))) for _ in range(2)]
        await asyncio.sleep(0.05)
        for job in jobs:
            job.cancel()
        assert (await pool.decode(encoded(picture()))).num_tiles > 0
        await wait_until(lambda: len(pool.pids) == 2 and not set(before) & set(pool.pids))

    with_pool(use, settings)


def test_closing_ends_all_children_and_all_that_wait() -> None:
    async def run() -> None:
        pool = DecoderPool(SETTINGS, TILING)
        await pool.open()
        pids = pool.pids
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        jobs = [asyncio.create_task(pool.decode(encoded(picture()))) for _ in range(5)]
        await asyncio.sleep(0.05)
        async with asyncio.timeout(20):
            await pool.close()
            results = await asyncio.gather(*jobs, return_exceptions=True)
        assert {type(result) for result in results} == {PoolClosed}
        assert not any(is_running(pid) for pid in pids)
        assert pool.pids == []
        with pytest.raises(PoolClosed):
            await pool.decode(encoded(picture()))

    asyncio.run(run())


def test_pool_leaves_no_descriptor_open() -> None:
    async def run() -> None:
        async with DecoderPool(SETTINGS, TILING) as pool:
            await pool.decode(encoded(picture()))

    asyncio.run(run())
    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(run())
    assert len(os.listdir("/proc/self/fd")) == before


def test_one_decoder_is_too_few() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        ImageSettings(num_decoders=1)


# ---- the child's own process


def start_child(parent_pid: int) -> subprocess.Popen[bytes]:
    config = msgspec.json.encode(DecoderConfig(SETTINGS, TILING, parent_pid)).decode()
    return subprocess.Popen(
        [sys.executable, "-P", "-m", CHILD, config], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


@pytest.mark.parametrize("rest", [b"", b"\0\0", b"\0\0\0\0" + (100).to_bytes(8, "big") + b"cut"])
def test_child_ends_with_its_stdin(rest: bytes) -> None:
    with start_child(os.getpid()) as child:
        out, _ = child.communicate(rest, timeout=60)
        assert child.returncode == 0
        assert len(out) == 4 + int.from_bytes(out[:4], "big"), "one frame: ready"


def test_child_of_another_parent_ends_at_once() -> None:
    with start_child(1) as child:
        assert child.wait(timeout=60) == 0


def test_children_die_with_their_parent() -> None:
    """The parent is killed, so that nothing of it can clean up."""
    code = """
import asyncio
from vlmserve.server.images.decoders import DecoderPool
from vlmserve.server.images.settings import ImageSettings
from vlmserve.server.images.tiling import TilingConfig
async def main():
    async with DecoderPool(ImageSettings(), TilingConfig()) as pool:
        print(*pool.pids, flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pids = [int(text) for text in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(is_running(pid) for pid in pids)
        parent.kill()
        parent.wait()
        asyncio.run(wait_until(lambda: not any(is_running(pid) for pid in pids)))


def test_child_knows_four_formats_and_no_torch() -> None:
    """Pillow's EXIF reader brings TIFF along; images are opened by the name of one format only."""
    code = """
import sys
from PIL import Image
from vlmserve.server.images import decoder_child
from vlmserve.server.images.decoding import prepare_pillow, decode
from vlmserve.server.images.settings import ImageSettings, ImageError
from vlmserve.server.images.tiling import TilingConfig
prepare_pillow(ImageSettings())
for data in (bytes(100), b"GIF89a" + bytes(100), b"\\xff\\xd8\\xff" + bytes(100)):
    try:
        decode(data, ImageSettings(), TilingConfig(), None)
    except Exception:
        pass
print(sorted(Image.OPEN))
print([name for name in sys.modules if name.split(".")[0] in ("torch", "transformers", "sanic")])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert out.stdout.splitlines() == ["['GIF', 'JPEG', 'PNG', 'TIFF', 'WEBP']", "[]"]


def test_live_child_has_no_torch_and_none_of_the_servers_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLMSERVE_API_KEY", "a secret")

    async def use(pool: DecoderPool) -> None:
        await pool.decode(encoded(picture()))
        for pid in pool.pids:
            assert b"torch" not in read_proc(pid, "maps")
            assert b"a secret" not in read_proc(pid, "environ")

    with_pool(use)


def test_signals_to_the_whole_group_leave_children_to_their_parent() -> None:
    async def use(pool: DecoderPool) -> None:
        pids = pool.pids
        for pid in pids:
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
        await asyncio.gather(*(pool.decode(encoded(picture())) for _ in range(4)))
        assert pool.pids == pids

    with_pool(use)


def test_image_side_never_imports_torch() -> None:
    code = (
        "import sys, vlmserve.server.images.loader;"
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert out.stdout.strip() == "[]"
