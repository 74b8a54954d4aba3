"""Pictures and settings that several tests of the image side share."""

from __future__ import annotations

import functools
import io
import struct
import zlib

import numpy as np
from PIL import Image

from vlmserve.server.images.header import ImageHeader
from vlmserve.server.images.settings import ImageSettings
from vlmserve.server.images.tiling import TilingConfig

TILING = TilingConfig(tile_size=56, max_image_tiles=4)
SETTINGS = ImageSettings()


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def picture(width: int = 70, height: int = 50) -> Image.Image:
    return Image.fromarray(noise(width, height))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png_of_zeros(width: int, height: int) -> bytes:
    """A valid 1-bit PNG of any size, a few kilobytes long."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = png_chunk(b"IHDR", head) + png_chunk(b"IDAT", packed) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


# Files, and what their headers say.
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


def with_png_chunk(data: bytes, kind: bytes, body: bytes) -> bytes:
    """A PNG with one more chunk after its header."""
    return data[:33] + png_chunk(kind, body) + data[33:]


@functools.cache
def bombs() -> dict[str, bytes]:
    """Pictures that are refused, by what is wrong. Made when first asked for: it takes seconds."""
    return {
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
