"""The limits of everything that has to do with a request's images.

Owns the names and defaults of the limits, what a request asks for, and the errors
of loading. Knows nothing of HTTP routes, pixels or processes.
"""

from __future__ import annotations

from dataclasses import dataclass

MEBI = 1024 * 1024
DEFAULT_MAX_IMAGE_BYTES = 20 * MEBI


class ImageError(Exception):
    """An image that a client sent cannot be used: status 400, safe to show to that client.

    message: names the problem and the remedy, never the URL or the data.
    index: place of the image among the request's images, from 0; None until the
    loader knows it.
    """

    def __init__(self, message: str, index: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.index = index


class PoolClosed(Exception):
    """The decoders were closed, by a server that stops, while an image waited for them."""

    def __init__(self) -> None:
        super().__init__("the decoder pool is closed")


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One image of a request, as the client named it.

    url: a data: URL with base64, or an http(s) URL. max_tiles: at most so many
    tiles (1 for `detail: low`); None takes what the checkpoint allows. tenant: only
    among images of the same tenant are decoded tiles shared.
    """

    url: str
    max_tiles: int | None = None
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """All limits on images, with their defaults.

    Count, bytes and pixels of one request are checked before anything is fetched,
    as far as its data URLs tell, and again as fetches come in.
    max_image_bytes: encoded bytes of one image, after base64. max_pixels: JPEG
    has a limit of its own, because it can be decoded at a fraction of its size
    (a progressive one cannot, so max_pixels is its limit too).
    allow_private_addresses: let image URLs reach private and loopback addresses,
    for a server whose clients are all trusted; link-local ones (where clouds
    keep their credentials) stay refused.
    decoder_memory_bytes: address space a decoder child may take beyond its start.
    tile_cache_bytes: tiles that are kept so that the same bytes are not decoded
    again; 0 keeps none.
    """

    max_images: int = 16
    max_image_bytes: int = DEFAULT_MAX_IMAGE_BYTES
    max_request_bytes: int = 64 * MEBI
    max_request_pixels: int = 200_000_000
    max_url_chars: int = 8192
    max_pixels: int = 25_000_000
    max_jpeg_pixels: int = 100_000_000
    max_side: int = 16_384
    max_aspect: int = 200
    fetch_timeout_s: float = 10.0
    max_redirects: int = 3
    max_concurrent_fetches: int = 32
    allow_private_addresses: bool = False
    num_decoders: int = 2
    decode_timeout_s: float = 5.0
    decoder_memory_bytes: int = 768 * MEBI
    tile_cache_bytes: int = 256 * MEBI

    def __post_init__(self) -> None:
        if self.num_decoders < 2:
            raise ValueError(
                f"num_decoders is {self.num_decoders}; take at least 2, so that one image "
                "which hangs its decoder does not stop the others"
            )
