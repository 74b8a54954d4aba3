"""The limits on a request's images.

Owns the names and defaults of the limits, the image request, and the errors of loading. Knows
nothing of HTTP routes, pixels or processes.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Annotated

from ... import __version__
from ...models.batch import Positive
from ...models.settings.option import Limit, Option

HTTP = "HTTP"
MEBI = 1024 * 1024
DEFAULT_MAX_IMAGE_BYTES = 20 * MEBI


# Printable ASCII; a blank at an end would be lost on the way.
_AGENT = re.compile(r"(?=.{1,256}\Z)[!-~](?:[ -~]*[!-~])?")


@functools.cache
def default_user_agent() -> str:
    """Name and version, and the project's page if the installed package names one."""
    from importlib import metadata  # here: a decoder imports this module and asks for no agent

    try:
        page = metadata.metadata("vlmserve").json.get("home_page")
    except metadata.PackageNotFoundError:
        page = None
    return f"vlmserve/{__version__}" + (f" (+{page})" if page else "")


class ImageError(Exception):
    """An image of a client is unusable: status 400, safe to show to that client.

    message: names the problem and the remedy, never the URL or the data. index: position among
    the request's images, from 0; None until the loader sets it.
    """

    def __init__(self, message: str, index: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.index = index


class PoolClosed(Exception):
    """The server is stopping: the decoders were closed while an image waited for them."""

    def __init__(self) -> None:
        super().__init__("the decoder pool is closed")


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One image of a request, as the client sent it.

    url: a data: URL with base64, or an http(s) URL. max_tiles: maximum number of tiles (1 for
    `detail: low`); None means the checkpoint's limit. tenant: decoded tiles are shared only
    between images of the same tenant. owner: the API key that waits in the lanes, as a hash.
    """

    url: str
    max_tiles: int | None = None
    tenant: str = ""
    owner: str = ""


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """All limits on images, with their defaults.

    Count, bytes and pixels of one request are checked before anything is fetched, as far as its
    data URLs show them, and again as fetches complete. Link-local addresses, where clouds serve
    credentials, stay blocked even with allow_private_addresses.
    """

    max_images: Annotated[Positive, Option("Maximum images in one request.", HTTP)] = 16
    max_image_bytes: Annotated[int, Limit("Maximum encoded bytes of one image, after base64.")] = (
        DEFAULT_MAX_IMAGE_BYTES
    )
    max_request_bytes: Annotated[
        int, Limit("Maximum encoded bytes of all images of a request.")
    ] = 64 * MEBI
    max_request_pixels: Annotated[int, Limit("Maximum pixels of all images of a request.")] = (
        200_000_000
    )
    max_url_chars: Annotated[int, Limit("Maximum characters of an image URL.")] = 8192
    max_pixels: Annotated[int, Limit("Maximum pixels of an image.")] = 25_000_000
    max_jpeg_pixels: Annotated[
        int, Limit("Maximum pixels of a baseline JPEG, which can be decoded at a reduced size.")
    ] = 100_000_000
    max_side: Annotated[int, Limit("Maximum pixels of an image's longer side.")] = 16_384
    max_aspect: Annotated[int, Limit("Maximum ratio of an image's longer to shorter side.")] = 200
    fetch_timeout_s: Annotated[float, Limit("Maximum seconds to download one image.")] = 10.0
    max_redirects: Annotated[int, Limit("Maximum redirects per download.")] = 3
    max_concurrent_fetches: Annotated[
        int, Limit("Maximum parallel downloads, of which one API key gets half.")
    ] = 64
    allow_private_addresses: Annotated[
        bool,
        Option(
            "Also fetch images from private and loopback addresses. Use only if all clients are "
            "trusted.",
            HTTP,
            name="allow-private-image-urls",
            has_negation=False,
        ),
    ] = False
    fetch_user_agent: Annotated[
        str | None,
        Option(
            "The User-Agent of image downloads. Some hosts, such as Wikimedia, refuse agents"
            " without their operator's page or address. Default: vlmserve/VERSION, with"
            " the project's page if the package names one.",
            HTTP,
            name="image-fetch-user-agent",
            metavar="TEXT",
        ),
    ] = None
    num_decoders: Annotated[int, Limit("Number of image decoder processes; at least 2.")] = 2
    decode_timeout_s: Annotated[
        float,
        Limit("Maximum CPU seconds to decode one image; after that, its decoder is restarted."),
    ] = 5.0
    decoder_memory_bytes: Annotated[
        int, Limit("Maximum memory of a decoder process beyond its start.")
    ] = 768 * MEBI
    tile_cache_bytes: Annotated[
        int, Limit("Size of the cache of decoded tiles; 0 disables it.")
    ] = 256 * MEBI

    @property
    def user_agent(self) -> str:
        """The User-Agent of downloads."""
        return default_user_agent() if self.fetch_user_agent is None else self.fetch_user_agent

    def __post_init__(self) -> None:
        agent = self.fetch_user_agent
        if agent is not None and not _AGENT.fullmatch(agent):
            raise ValueError(
                f"--image-fetch-user-agent is {agent[:100]!r}: write 1 to 256 printable ASCII"
                ' characters, such as "captions/1.0 (+https://example.com/captions)"'
            )
        if self.num_decoders < 2:
            raise ValueError(
                f"num_decoders is {self.num_decoders}: set it to at least 2, so that one image "
                "that hangs its decoder does not stop the others"
            )
