"""Reads an image file's format and size from its first bytes, and checks them.

Owns the supported formats and the limits on pixels, sides and proportions. Reads headers in plain
Python, in time bounded by the number of their segments, so a worker may call it on any bytes.
Knows nothing of Pillow, pixels or tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

from .settings import ImageError, ImageSettings

ACCEPTED = "send a JPEG, PNG, WebP or GIF"
MAX_JPEG_SEGMENTS = 2000
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
AVIF_BRANDS = {b"avif", b"avis"}
OTHER_FORMATS = {
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
    b"BM": "BMP",
    b"%PDF": "PDF",
    b"<svg": "SVG",
    b"<?xml": "XML or SVG",
    b"<!DOCTYPE": "HTML",
    b"<html": "HTML",
    b"\x00\x00\x01\x00": "ICO",
    b"\xff\x0a": "JPEG XL",
    b"\x00\x00\x00\x0cJXL ": "JPEG XL",
    b"\x00\x00\x00\x0cjP  ": "JPEG 2000",
}
# Start-of-frame markers: C0 to CF except DHT (C4), JPG (C8) and DAC (CC).
FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
PROGRESSIVE_MARKERS = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
BARE_MARKERS = frozenset(range(0xD0, 0xD8)) | {0x01, 0xD8}


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """The header of an image. format: Pillow's name of it. width, height: in pixels."""

    format: str
    width: int
    height: int
    is_progressive: bool = False


def read_header(data: bytes) -> ImageHeader:
    """The header of an encoded image, from its bytes alone.

    Raises ImageError for an unsupported format or a damaged header.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return _read_jpeg(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _read_png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _read_webp(data)
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return _read_gif(data)
    raise ImageError(_name_refused(data))


def check_header(header: ImageHeader, settings: ImageSettings) -> None:
    """Raise ImageError if an image of this size may not be decoded."""
    width, height = header.width, header.height
    if width < 1 or height < 1:
        raise ImageError(f"image is {width} x {height} pixels: it has no content")
    if max(width, height) > settings.max_side:
        raise ImageError(
            f"image is {width} x {height} pixels; a side may have {settings.max_side}: "
            "scale it down"
        )
    if max(width, height) > settings.max_aspect * min(width, height):
        raise ImageError(
            f"image is {width} x {height} pixels; one side may be {settings.max_aspect} times "
            "the other: crop it"
        )
    limit = pixel_limit(header, settings)
    if width * height > limit:
        raise ImageError(
            f"image has {width * height:,} pixels; the limit for this format is {limit:,}: "
            "scale it down"
        )


def pixel_limit(header: ImageHeader, settings: ImageSettings) -> int:
    """The maximum number of pixels of an image of this format.

    A progressive JPEG needs memory for all its coefficients, even when it is decoded at a
    smaller size. So it does not get the larger limit of JPEG.
    """
    is_scalable = header.format == "JPEG" and not header.is_progressive
    return settings.max_jpeg_pixels if is_scalable else settings.max_pixels


def _name_refused(data: bytes) -> str:
    """The error text for bytes of none of our formats."""
    if not data:
        return f"image is empty: {ACCEPTED}"
    if data[4:8] == b"ftyp":
        if data[8:12] in HEIF_BRANDS:
            return "image is HEIC, which is not supported: convert it to JPEG or PNG first"
        if data[8:12] in AVIF_BRANDS:
            return "image is AVIF, which is not supported: convert it to JPEG or PNG first"
    start = data[:64]
    for magic, name in OTHER_FORMATS.items():
        if start.startswith(magic) or start.lstrip().startswith(magic):
            return f"image is {name}, which is not supported: {ACCEPTED}"
    return f"image has an unknown format: {ACCEPTED}"


def _truncated(name: str) -> ImageError:
    return ImageError(f"image is a {name} with a damaged or cut off header: send the whole file")


def _read_png(data: bytes) -> ImageHeader:
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise _truncated("PNG")
    width = int.from_bytes(data[16:20], "big")
    return ImageHeader("PNG", width, int.from_bytes(data[20:24], "big"))


def _read_gif(data: bytes) -> ImageHeader:
    if len(data) < 13:
        raise _truncated("GIF")
    width = int.from_bytes(data[6:8], "little")
    return ImageHeader("GIF", width, int.from_bytes(data[8:10], "little"))


def _read_webp(data: bytes) -> ImageHeader:
    """Lossy (VP8), lossless (VP8L) and extended (VP8X) files: RFC 9649, section 2."""
    if len(data) < 30:
        raise _truncated("WebP")
    kind = data[12:16]
    if kind == b"VP8X":
        width = int.from_bytes(data[24:27], "little") + 1
        return ImageHeader("WEBP", width, int.from_bytes(data[27:30], "little") + 1)
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return ImageHeader("WEBP", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width = int.from_bytes(data[26:28], "little") & 0x3FFF
        return ImageHeader("WEBP", width, int.from_bytes(data[28:30], "little") & 0x3FFF)
    raise _truncated("WebP")


def _read_jpeg(data: bytes) -> ImageHeader:
    """Walk the segments to the frame header: ITU-T T.81, annex B."""
    position = 2
    for _ in range(MAX_JPEG_SEGMENTS):
        position = data.find(b"\xff", position)
        if position < 0 or position + 9 > len(data):
            break
        marker = data[position + 1]
        if marker == 0xFF:  # padding before a marker
            position = _end_of_padding(data, position)
        elif marker in BARE_MARKERS:
            position += 2
        elif marker in FRAME_MARKERS:
            return _read_jpeg_frame(data, position, marker)
        elif marker in (0xD9, 0xDA):  # end of image, start of scan: no frame came
            break
        else:
            position += 2 + max(2, int.from_bytes(data[position + 2 : position + 4], "big"))
    raise _truncated("JPEG")


def _end_of_padding(data: bytes, position: int) -> int:
    """The position of the last 0xFF of a run, found in C in linear time."""
    run = len(data[position : position + 65_536]) - len(
        data[position : position + 65_536].lstrip(b"\xff")
    )
    return position + max(run - 1, 1)


def _read_jpeg_frame(data: bytes, position: int, marker: int) -> ImageHeader:
    height = int.from_bytes(data[position + 5 : position + 7], "big")
    width = int.from_bytes(data[position + 7 : position + 9], "big")
    return ImageHeader("JPEG", width, height, is_progressive=marker in PROGRESSIVE_MARKERS)
