"""Parses an image's URL: its bytes (data:), or the place to fetch it from (http, https).

Owns the accepted syntax. One parser reads each URL once, and the fetcher connects to what it
found, so no second parser can disagree. Knows nothing of networks, addresses or image formats.
"""

from __future__ import annotations

import binascii
import re
from dataclasses import dataclass

import httpx2

from .settings import ImageError, ImageSettings

# Some readers of a log or a header end a line at 0x85 and at the line separators.
FORBIDDEN_IN_URL = re.compile(r"[\x00-\x20\x7f-\xa0\u2028\u2029\\]")
HOST = re.compile(
    r"(?=.{1,253}\Z)([a-z0-9_][a-z0-9_-]{0,62}(\.[a-z0-9_-]{1,63})*\.?|[0-9a-f.]*:[0-9a-f:.]*)"
)
# No user, and a port in digits: the parser would accept "@h" and ":+80".
AUTHORITY = re.compile(r"([^@:\[\]]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{0,5})?")
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,31}(?=:)")
HTTP_SCHEME = re.compile(r"https?:", re.IGNORECASE)
BLANK = re.compile(r"\s")
# A file of this machine or of the client's, by its start or by its name.
FILE_PATH = re.compile(r"file:|~|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\\\\|/(?![/9])", re.IGNORECASE)
IMAGE_NAME = re.compile(r"^[^:?]*\.(?:png|jpe?g|gif|webp|bmp|tiff?|heic|avif)$", re.IGNORECASE)
MAX_PATH_CHARS = 1024
# The first characters that JPEG, PNG, GIF, WebP and BMP files have in base64, or a long run of it.
BARE_BASE64 = re.compile(r"/9j/|iVBORw0|R0lGOD|UklGR|Qk0|[A-Za-z0-9+/_-]{64}")
DATA_AGAIN = re.compile("data:", re.IGNORECASE)
PRINTED_BYTES = re.compile("b['\"]")
NO_BASE64 = re.compile("[^A-Za-z0-9+/=]")
# Host and path of a link without its scheme: `www.example.com/a.png`.
BARE_LINK = re.compile(r"(?:www\.|(?:[a-z0-9-]+\.)+[a-z]{2,}(?::[0-9]+)?/)", re.IGNORECASE)
MAX_DATA_URL_LABEL = 256
# A multiple of four: each slice is base64 by itself.
BASE64_SLICE_CHARS = 262_144
# One character of a path is at most four bytes of UTF-8, each percent-encoded.
MAX_ESCAPE_CHARS = 12
DEFAULT_PORTS = {"http": 80, "https": 443}
# Other low ports belong to services such as mail and ssh, never to images.
FIRST_FREE_PORT = 1024


@dataclass(frozen=True, slots=True)
class InlineImage:
    """An image inside its URL. data: the encoded file."""

    data: bytes


@dataclass(frozen=True, slots=True)
class RemoteImage:
    """An image to be fetched.

    host: lower-case ASCII (IDNA applied), an IPv6 literal without brackets.
    target: path and query, percent-encoded, from "/".
    """

    scheme: str
    host: str
    port: int
    target: str

    @property
    def authority(self) -> str:
        """The Host header: the port only where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}{self.target}"


def parse_source(url: str, settings: ImageSettings) -> InlineImage | RemoteImage:
    """Parse an image's URL.

    Raises ImageError, which never quotes the URL, unless it is a base64 data: URL within
    max_image_bytes or a plain http(s) URL.
    """
    if url[:5].lower() == "data:":
        return parse_data_url(url, settings.max_image_bytes)
    return parse_remote_url(url, settings.max_url_chars)


def parse_data_url(url: str, max_bytes: int) -> InlineImage:
    """The bytes of `data:<label>;base64,<base64>`. The label is ignored.

    Line breaks, blanks and missing padding are accepted, as other readers of base64 do.
    """
    comma = url.find(",", 0, MAX_DATA_URL_LABEL)
    if comma < 0 or not url[:comma].lower().replace(" ", "").endswith(";base64"):
        raise ImageError("data URL must look like data:image/png;base64,<the file in base64>")
    text, start = url, comma + 1
    if BLANK.search(url, start):
        text, start = "".join(url[start:].split()), 0
    num_chars = len(text) - start
    if num_chars // 4 * 3 > max_bytes + 2:
        raise ImageError(too_large(num_chars // 4 * 3, max_bytes))
    try:
        data = _decode_base64(text, start)
    except ValueError:  # binascii.Error is one, and non-ASCII characters raise it too
        raise ImageError(f"data URL is {_fault_of(text, start)}") from None
    if len(data) > max_bytes:
        raise ImageError(too_large(len(data), max_bytes))
    if not data:
        raise ImageError("data URL is empty: append the file in base64")
    return InlineImage(data)


def _fault_of(text: str, start: int) -> str:
    """What is wrong with text[start:], which is no base64, and how to mend it."""
    if DATA_AGAIN.match(text, start):
        return "not valid base64: it starts with data: again. Put data:image/png;base64, once"
    if PRINTED_BYTES.match(text, start):
        return "not valid base64: it starts with b', as Python prints bytes. Use .decode()"
    if text.find("%", start) >= 0:
        return "percent-encoded base64: send +, / and = themselves"
    if text.find("-", start) >= 0 or text.find("_", start) >= 0:
        return "URL-safe base64, with - and _: use the standard alphabet, with + and /"
    if NO_BASE64.search(text, start):
        return "not valid base64: use the standard alphabet"
    return "not valid base64: its length or its padding is that of a text that was cut or joined"


def _decode_base64(text: str, start: int) -> bytes:
    """The bytes of text[start:], decoded in slices: one call would block every thread.

    Raises ValueError unless it is plain base64 with padding at its end only, or without.
    """
    num_missing = -(len(text) - start) % 4
    if num_missing:
        if num_missing == 3 or text.find("=", start) >= 0:
            raise ValueError("no length that base64 can have")
        text += "=" * num_missing
    if text.find("=", start, len(text) - 2) >= 0:
        raise ValueError("padding before the end")
    places = range(start, len(text), BASE64_SLICE_CHARS)
    slices = (text[place : place + BASE64_SLICE_CHARS] for place in places)
    return b"".join(binascii.a2b_base64(part, strict_mode=True) for part in slices)


def parse_remote_url(url: str, max_chars: int) -> RemoteImage:
    """Parse a plain http(s) URL: no user, no odd characters, an allowed port."""
    if not HTTP_SCHEME.match(url):
        _refuse_what_is_no_url(url)
    if len(url) > max_chars:
        raise ImageError(f"image URL has {len(url):,} characters; the limit is {max_chars:,}")
    if FORBIDDEN_IN_URL.search(url):
        raise ImageError(
            "image URL contains a space, backslash or control character: percent-encode it"
        )
    scheme = SCHEME.match(url)
    if scheme is None:
        raise ImageError("image URL has no scheme: start it with https://, http:// or data:image/")
    if scheme.group().lower() not in DEFAULT_PORTS:
        raise ImageError(
            f"image URL has the scheme {scheme.group().lower()!r}: only http, https and data "
            "are allowed"
        )
    if not url[scheme.end() :].startswith("://"):
        raise ImageError("image URL has no host: it must start with https:// or http://")
    check_authority(re.split("[/?#]", url[scheme.end() + 3 :], maxsplit=1)[0])
    found = _from_parsed(_parse(url))
    # Non-ASCII dots and digits were mapped to ASCII ones: parse and check the result again.
    return found if url.isascii() else parse_remote_url(found.url, max_chars * MAX_ESCAPE_CHARS)


def _refuse_what_is_no_url(url: str) -> None:
    """Raise ImageError, with what to put in front, for bare base64 and for a file's path."""
    if BARE_LINK.match(url):
        raise ImageError("image URL has no scheme: put https:// before the host")
    if FILE_PATH.match(url) or (len(url) <= MAX_PATH_CHARS and IMAGE_NAME.search(url)):
        raise ImageError(
            "image URL is the path of a file, which the server does not read: send the file itself "
            "as data:image/png;base64,<the file in base64>"
        )
    if BARE_BASE64.match(url):
        raise ImageError("image URL has no scheme: put data:image/png;base64, before the base64")


def check_authority(authority: str) -> None:
    """Raise ImageError unless this is one host with an optional port."""
    if "@" in authority:
        raise ImageError("image URL contains a user name or password: remove it")
    if not AUTHORITY.fullmatch(authority):
        raise ImageError("image URL cannot be parsed: check its host and port")


def too_large(num_bytes: int, max_bytes: int) -> str:
    """The message for an image over its limit of bytes."""
    return f"image has {num_bytes:,} bytes; the limit is {max_bytes:,}: send a smaller file"


def _parse(url: str) -> httpx2.URL:
    try:
        return httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError):
        raise ImageError("image URL cannot be parsed: check its host and port") from None


def _from_parsed(parsed: httpx2.URL) -> RemoteImage:
    host = parsed.raw_host.decode("ascii").lower()
    if not HOST.fullmatch(host):
        raise ImageError("image URL has no valid host name")
    port = parsed.port if parsed.port is not None else DEFAULT_PORTS[parsed.scheme]
    if port not in DEFAULT_PORTS.values() and not FIRST_FREE_PORT <= port <= 65_535:
        raise ImageError(
            f"image URL has port {port}: only 80, 443 and {FIRST_FREE_PORT} to 65535 are allowed"
        )
    return RemoteImage(parsed.scheme, host, port, parsed.raw_path.decode("ascii"))
