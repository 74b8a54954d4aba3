"""From an encoded image to its tiles: what a decoder child does with one image.

Owns the use of Pillow: four formats only, limits before pixels, the first frame, EXIF rotation,
and conversion to 8-bit RGB over white. Runs in a child process that may be killed at any moment.
Knows nothing of pipes, networks or requests.
"""

from __future__ import annotations

import hashlib
import io

from PIL import (
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)

from ...models.batch import ImageTiles
from .header import ImageHeader, check_header, read_header
from .settings import ImageSettings
from .tiling import TilingConfig, cut

# A JPEG of more pixels is decoded at a half, a quarter or an eighth of its sides. So even a
# rotated JPEG takes under 200 MB, and it still has far more detail than four tiles can show.
DRAFT_PIXELS = 16_000_000
BAND_ROWS = 256
ORIENTATION_TAG = 0x0112
# The turn that undoes each EXIF orientation (1 is upright).
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PLUGINS = (GifImagePlugin, JpegImagePlugin, MpoImagePlugin, PngImagePlugin, WebPImagePlugin)


def prepare_pillow(settings: ImageSettings) -> None:
    """Set this process's Pillow limits to ours, and load no other format."""
    assert all(plugin.__name__ for plugin in PLUGINS)
    Image._initialized = 2  # otherwise init() imports some forty formats
    Image.MAX_IMAGE_PIXELS = max(settings.max_pixels, settings.max_jpeg_pixels)
    ImageFile.LOAD_TRUNCATED_IMAGES = False


def decode(
    data: bytes, settings: ImageSettings, tiling: TilingConfig, max_tiles: int | None
) -> ImageTiles:
    """The tiles of one encoded image.

    Raises ImageError for a header over a limit. For damaged data it raises any of Pillow's
    exceptions, which the caller translates.
    """
    header = read_header(data)
    check_header(header, settings)
    with Image.open(io.BytesIO(data), formats=[header.format]) as image:
        # Pillow allocates by the size that it read itself.
        check_header(
            ImageHeader(header.format, image.width, image.height, header.is_progressive), settings
        )
        picture = upright_rgb(image, draft_pixels=DRAFT_PIXELS)
    return cut(picture, tiling, max_tiles, content_hash(data, tiling, max_tiles))


def content_hash(data: bytes, tiling: TilingConfig, max_tiles: int | None) -> bytes:
    """SHA-256 of the encoded bytes and of all settings that change the tiles.

    The digest of the settings comes first and has a fixed length, so that no bytes of a file
    can pass for settings.
    """
    settings = hashlib.sha256(tiling.fingerprint(max_tiles)).digest()
    return hashlib.sha256(settings + data).digest()


def upright_rgb(image: ImageFile.ImageFile, draft_pixels: int) -> Image.Image:
    """The first frame as RGB, rotated by its EXIF, transparent parts over white."""
    if image.format in ("JPEG", "MPO"):
        image.draft(None, _draft_size(image.size, draft_pixels))
    image.load()
    return to_rgb(_turn_upright(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode of our formats to 8-bit RGB, as transformers' convert_to_rgb does.

    16-bit grey keeps its high byte; a plain convert would clip it to white.
    """
    if image.mode.startswith("I"):
        return _grey_to_8_bit(image).convert("RGB")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        return _over_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _draft_size(size: tuple[int, int], draft_pixels: int) -> tuple[int, int]:
    """The size for draft(): the largest of 1, 1/2, 1/4 and 1/8 within draft_pixels."""
    width, height = size
    scale = 1
    while scale < 8 and (width // scale) * (height // scale) > draft_pixels:
        scale *= 2
    return max(width // scale, 1), max(height // scale, 1)


def _turn_upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; an unreadable EXIF block is ignored."""
    try:
        orientation = image.getexif().get(ORIENTATION_TAG)
        turn = TURNS.get(orientation) if isinstance(orientation, int) else None
    except MemoryError:
        raise
    except Exception:
        turn = None
    return image if turn is None else image.transpose(turn)


def _grey_to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit grey (I;16, or 32-bit I with 16-bit values) to L."""
    # Pillow cuts the fraction off; `convert` clips what is over 8 bits.
    return image.convert("I").point(lambda value: value * (1 / 256)).convert("L")


def _over_white(image: Image.Image) -> Image.Image:
    """Composite onto white in bands of rows: copies of a whole large image take too much memory."""
    result = Image.new("RGB", image.size)
    for top in range(0, image.height, BAND_ROWS):
        box = (0, top, image.width, min(top + BAND_ROWS, image.height))
        band = image.crop(box)
        band.info = image.info
        rgba = band.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        result.paste(Image.alpha_composite(white, rgba).convert("RGB"), box)
    return result
