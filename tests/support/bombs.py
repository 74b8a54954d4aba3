"""Pictures that cost far more than their size: one builder for each way, written from code.

The files have some megabytes at most. What each does was read in Pillow's and the formats' sources.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterable

from PIL import Image
from support.pictures import encoded, noise, picture, png_chunk, png_of_zeros, with_png_chunk

MEBI = 1 << 20
SMALL_PNG = encoded(picture())
SMALL_JPEG = encoded(picture(), "JPEG")


def deflated_zeros(num_bytes: int) -> bytes:
    """A zlib stream of zeros, a thousandth of their size. It ends without a checksum."""
    packer = zlib.compressobj(9)
    first, again = (packer.compress(bytes(MEBI)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in "12")
    return first + again * (num_bytes // MEBI - 1)


def png_text_bomb() -> bytes:
    return with_png_chunk(SMALL_PNG, b"zTXt", b"c\0\0" + deflated_zeros(2000 * MEBI))


def png_international_text_bomb() -> bytes:
    return with_png_chunk(SMALL_PNG, b"iTXt", b"c\0\1\0\0\0" + deflated_zeros(2000 * MEBI))


def png_profile_bomb() -> bytes:
    return with_png_chunk(SMALL_PNG, b"iCCP", b"c\0\0" + deflated_zeros(2000 * MEBI))


def png_of_many_chunks(num_chunks: int = 1_000_000) -> bytes:
    return SMALL_PNG[:33] + png_chunk(b"tEXt", b"a\0b") * num_chunks + SMALL_PNG[33:]


def png_of_empty_data(num_chunks: int = 1_000_000) -> bytes:
    """Pixel chunks of no byte before the pixels."""
    return SMALL_PNG[:33] + png_chunk(b"IDAT", b"") * num_chunks + SMALL_PNG[33:]


def animated_png(num_frames: int = 200_000) -> bytes:
    """An APNG that claims frames without end, each of the whole picture."""
    control = png_chunk(b"acTL", struct.pack(">II", 0xFFFF_FFFF, 0))
    frame = struct.pack(">IIIIIHHBB", 0, 70, 50, 0, 0, 1, 100, 0, 0)
    frames = png_chunk(b"fcTL", frame) + png_chunk(b"fdAT", struct.pack(">I", 1) + b"x")
    return SMALL_PNG[:33] + control + frames * num_frames + SMALL_PNG[33:]


def png_of_zeros_interlaced() -> bytes:
    """25 megapixels in seven passes, in some kilobytes."""
    data = bytearray(png_of_zeros(5000, 5000))
    data[28] = 1  # interlaced: IHDR's last byte
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def exif_block(entries: Iterable[bytes], tail: bytes = b"") -> bytes:
    """A TIFF block of one directory."""
    listed = list(entries)
    count = struct.pack("<H", len(listed))
    return b"II*\0" + struct.pack("<I", 8) + count + b"".join(listed) + bytes(4) + tail


def same_tag_again(tail_bytes: int) -> bytes:
    """65,535 entries of one tag, each of which reads the whole tail."""
    offset = 8 + 2 + 65_535 * 12 + 4
    entry = struct.pack("<HHII", 0x9286, 7, tail_bytes, offset)
    return exif_block([entry] * 65_535, bytes(tail_bytes))


def many_tags(tail_bytes: int) -> bytes:
    """65,535 tags that each keep a copy of the tail: hundreds of gigabytes."""
    offset = 8 + 2 + 65_535 * 12 + 4
    entries = [struct.pack("<HHII", tag, 7, tail_bytes, offset) for tag in range(65_535)]
    return exif_block(entries, bytes(tail_bytes))


def looping_directories() -> bytes:
    """Directories of EXIF, GPS and interoperability that are the first one again."""
    tags = (0x8769, 0x8825, 0xA005, 0x014A)
    block = bytearray(exif_block(struct.pack("<HHII", tag, 4, 1, 8) for tag in tags))
    block[-4:] = struct.pack("<I", 8)  # the next directory, too
    return bytes(block)


def png_with_exif(block: bytes) -> bytes:
    return with_png_chunk(SMALL_PNG, b"eXIf", block)


def jpeg_with_segments(marker: int, body: bytes, count: int) -> bytes:
    segment = b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body
    return SMALL_JPEG[:2] + segment * count + SMALL_JPEG[2:]


def jpeg_with_exif_of_60_mb() -> bytes:
    """More than a picture may have: segments of 64 kB, each said to be EXIF."""
    return jpeg_with_segments(0xE1, b"Exif\0\0" + bytes(65_000), 60_000_000 // 65_000)


def jpeg_with_exif_of_19_mb() -> bytes:
    return jpeg_with_segments(0xE1, b"Exif\0\0" + many_tags(4)[:65_000], 290)


def jpeg_of_many_comments() -> bytes:
    return jpeg_with_segments(0xFE, b"c", 1_900)


def jpeg_of_many_scans(num_scans: int = 20_000) -> bytes:
    """A progressive JPEG of 16 megapixels whose last scan comes again and again."""
    data = encoded(Image.new("L", (4000, 4000)), "JPEG", progressive=True, quality=1)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * num_scans + data[-2:]


def multi_picture_jpeg(num_pictures: int = 1_000_000) -> bytes:
    """An MPO whose index claims a million pictures, at offsets of which none exists."""
    buffer = io.BytesIO()
    picture().save(buffer, "MPO", save_all=True, append_images=[picture()])
    data = bytearray(buffer.getvalue())
    entry = data.index(struct.pack("<HHII", 0xB001, 4, 1, 2))
    data[entry + 8 : entry + 12] = struct.pack("<I", num_pictures)
    return bytes(data)


def gif_of_many_frames(num_frames: int = 1_000_000) -> bytes:
    """A million frames of one pixel, 20 bytes each."""
    data = encoded(Image.new("P", (1, 1)), "GIF")
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return data[:-1] + frame * num_frames + b"\x3b"


def gif_of_one_long_comment() -> bytes:
    """A comment of 18 MB in blocks of 255 bytes: Pillow joins them one by one."""
    data = encoded(Image.new("P", (1, 1)), "GIF")
    start = data.index(b"\x2c\0\0\0\0")
    return data[:start] + b"\x21\xfe" + (b"\xff" + b"c" * 255) * 70_000 + b"\0" + data[start:]


def gif_with_a_frame_beyond_its_screen() -> bytes:
    """A screen of one pixel, and a frame of 65,535 x 65,535."""
    data = bytearray(encoded(Image.new("P", (1, 1)), "GIF"))
    start = data.index(b"\x2c\0\0\0\0")
    data[start + 5 : start + 9] = struct.pack("<HH", 65_535, 65_535)
    return bytes(data)


def animated_webp(num_frames: int = 150_000) -> bytes:
    """An animation in whose file the second frame comes again and again."""
    buffer = io.BytesIO()
    frames = [Image.fromarray(noise(16, 16, seed=seed)) for seed in (1, 2)]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], quality=1)
    data = buffer.getvalue()
    last = data.rindex(b"ANMF")
    return riff(data[8:] + data[last:] * num_frames)


def webp_on_a_large_canvas() -> bytes:
    """Two frames of 16 x 16 on a canvas of 5,000 x 5,000."""
    buffer = io.BytesIO()
    frames = [Image.fromarray(noise(16, 16, seed=seed)) for seed in (1, 2)]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    data = bytearray(buffer.getvalue())
    data[24:30] = (4999).to_bytes(3, "little") * 2
    return bytes(data)


def webp_with_metadata(kind: bytes, flag: int, body: bytes) -> bytes:
    plain = encoded(picture(), "WEBP")[12:]
    head = struct.pack("<BBH", flag, 0, 0) + (69).to_bytes(3, "little") + (49).to_bytes(3, "little")
    chunks = b"VP8X" + struct.pack("<I", 10) + head
    return riff(b"WEBP" + chunks + plain + kind + struct.pack("<I", len(body)) + body)


def riff(content: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", len(content)) + content


# Each of an accepted format. Building one takes up to some seconds, so a test builds it.
BUILDERS: dict[str, Callable[[], bytes]] = {
    "zTXt of 2 GB": png_text_bomb,
    "iTXt of 2 GB": png_international_text_bomb,
    "iCCP of 2 GB": png_profile_bomb,
    "a million text chunks": png_of_many_chunks,
    "a million empty data chunks": png_of_empty_data,
    "APNG of 200,000 frames": animated_png,
    "25 megapixels interlaced": png_of_zeros_interlaced,
    "EXIF of one tag, 65,535 times": lambda: png_with_exif(same_tag_again(16 * MEBI)),
    "EXIF of 65,535 tags": lambda: png_with_exif(many_tags(16 * MEBI)),
    "EXIF in a loop": lambda: png_with_exif(looping_directories()),
    "EXIF of 60 MB": jpeg_with_exif_of_60_mb,
    "EXIF of 19 MB": jpeg_with_exif_of_19_mb,
    "JPEG of many comments": jpeg_of_many_comments,
    "JPEG of 20,000 scans": jpeg_of_many_scans,
    "MPO of a million pictures": multi_picture_jpeg,
    "GIF of a million frames": gif_of_many_frames,
    "GIF with a comment of 18 MB": gif_of_one_long_comment,
    "GIF with a frame beyond its screen": gif_with_a_frame_beyond_its_screen,
    "WebP of 150,000 frames": animated_webp,
    "WebP on a canvas of 25 megapixels": webp_on_a_large_canvas,
    "WebP with EXIF": lambda: webp_with_metadata(b"EXIF", 0x08, same_tag_again(16 * MEBI)),
    "WebP with a profile of 16 MB": lambda: webp_with_metadata(b"ICCP", 0x20, bytes(16 * MEBI)),
}


def tiff(*entries: tuple[int, int, int], next_directory: int = 0) -> bytes:
    """A TIFF of (tag, count, value) entries, all of them LONG."""
    body = b"".join(struct.pack("<HHII", tag, 4, count, value) for tag, count, value in entries)
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    return head + body + struct.pack("<I", next_directory)


# Of formats that are not accepted: none may reach a decoder.
REJECTED = {
    "TIFF of a billion tiles": tiff(
        (256, 1, 1 << 20), (257, 1, 1 << 20), (322, 1, 16), (323, 1, 16), (324, 1 << 30, 8)
    ),
    "TIFF with one huge strip": tiff(
        (256, 1, 65_535), (257, 1, 65_535), (273, 1, 8), (278, 1, 65_535), (279, 1, 0xFFFF_FFFF)
    ),
    "TIFF whose directories loop": tiff((256, 1, 1), (257, 1, 1), next_directory=8),
    "BigTIFF": b"II+\0\x08\0\0\0" + bytes(64),
    "JPEG 2000 codestream": b"\xff\x4f\xff\x51" + bytes(64),
    "BMP of a run": b"BM" + struct.pack("<IHHIIiiHHI", 99, 0, 0, 54, 40, 60_000, 60_000, 1, 8, 1),
    "PSD": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 4, 30_000, 30_000, 8, 3) + bytes(64),
    "FLI": struct.pack("<IHHHHHH", 128, 0xAF11, 65_535, 30_000, 30_000, 8, 3) + bytes(120),
    "AVIF": b"\0\0\0\x1cftypavif" + bytes(64),
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg' width='99999' height='99999'/>",
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\n",
    "FITS": b"SIMPLE  =                    T",
}
