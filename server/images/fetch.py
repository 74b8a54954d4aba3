"""Fetches images from http(s) URLs, and from nowhere that a stranger should not reach.

Owns one network backend through which every connection goes: it judges each address
of a name's answer and connects to the judged address itself, so that a second lookup
cannot differ. TLS still verifies the name. Redirects are followed by hand, each hop
judged like the first. A request carries no cookie, credential or proxy: the
connection pool beneath knows none, and reads no environment. Knows nothing of image
formats.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterable, Sequence
from ipaddress import ip_address
from typing import Protocol
from urllib.parse import urljoin

import httpcore2

from .addresses import Address, is_allowed, parse_literal
from .settings import ImageError, ImageSettings
from .sources import RemoteImage, parse_remote_url, too_large

USER_AGENT = b"vlmserve (image fetch for a vision-language model)"
REDIRECTS = {301, 302, 303, 307, 308}
MAX_ADDRESSES = 4
# For one address of several, so that one that swallows packets leaves time for the next.
CONNECT_TIMEOUT_S = 3.0
PLAIN = {b"", b"identity"}
NOT_PUBLIC = (
    "image URL's host is not a public address: private, loopback, link-local and other special "
    "addresses are refused"
)
ODD_SPELLING = "image URL's host is a number that is no plain IP address: write it in full"
UNRESOLVED = "image URL's host name cannot be resolved"
UNREACHABLE = "image URL's server cannot be reached"


class Resolver(Protocol):
    """Looks up names."""

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        """The IP addresses of a host; raises OSError if there are none."""


class Connector(Protocol):
    """Opens connections to addresses that were judged."""

    async def connect(
        self, address: str, port: int, timeout_s: float | None
    ) -> httpcore2.AsyncNetworkStream:
        """A stream to the address; raises httpcore2.ConnectError or ConnectTimeout."""


class SystemResolver:
    """The operating system's resolver."""

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        loop = asyncio.get_running_loop()
        answers = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


class TcpConnector:
    """Plain TCP connections."""

    def __init__(self) -> None:
        self._backend = httpcore2.AnyIOBackend()

    async def connect(
        self, address: str, port: int, timeout_s: float | None
    ) -> httpcore2.AsyncNetworkStream:
        return await self._backend.connect_tcp(address, port, timeout=timeout_s)


class GuardedBackend(httpcore2.AsyncNetworkBackend):
    """The one way out: every host, whether of a URL or a redirect, passes here."""

    def __init__(self, resolver: Resolver, connector: Connector, allow_private: bool) -> None:
        self._resolver = resolver
        self._connector = connector
        self._allow_private = allow_private

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """A stream to the first address of the host that answers, once all were judged.

        Raises ImageError if any address is refused, ConnectError if none answers.
        """
        addresses = await self._judged_addresses(host, port)
        failure: Exception = httpcore2.ConnectError(UNREACHABLE)
        timeout_s = CONNECT_TIMEOUT_S if timeout is None else timeout
        for address in addresses[:MAX_ADDRESSES]:
            try:
                return await self._connector.connect(str(address), port, timeout_s)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout, OSError) as error:
                failure = error
        raise failure

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        raise httpcore2.ConnectError("images are never fetched over Unix sockets")

    async def _judged_addresses(self, host: str, port: int) -> list[Address]:
        """All addresses of the host; one that is refused refuses the host."""
        try:
            literal = parse_literal(host)
        except ValueError:
            raise ImageError(ODD_SPELLING) from None
        addresses = [literal] if literal is not None else await self._resolve(host, port)
        if not all(is_allowed(found, allow_private=self._allow_private) for found in addresses):
            raise ImageError(NOT_PUBLIC)
        return addresses

    async def _resolve(self, host: str, port: int) -> list[Address]:
        try:
            addresses = [ip_address(text) for text in await self._resolver.resolve(host, port)]
        except (OSError, ValueError):
            raise ImageError(UNRESOLVED) from None
        if not addresses:
            raise ImageError(UNRESOLVED)
        return addresses


class ImageFetcher:
    """Downloads encoded images within the limits of ImageSettings.

    resolver and connector take the place of DNS and TCP in tests; ssl_context
    that of the system's certificates. https may not be left again by a redirect.
    Close it when done.
    """

    def __init__(
        self,
        settings: ImageSettings,
        *,
        resolver: Resolver | None = None,
        connector: Connector | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._settings = settings
        backend = GuardedBackend(
            resolver or SystemResolver(),
            connector or TcpConnector(),
            settings.allow_private_addresses,
        )
        self._slots = asyncio.Semaphore(settings.max_concurrent_fetches)
        # No connection is kept: one that is reused would be judged by an older answer.
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=ssl_context or httpcore2.default_ssl_context(),
            max_connections=settings.max_concurrent_fetches,
            max_keepalive_connections=0,
            network_backend=backend,
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._pool.aclose()

    async def fetch(self, source: RemoteImage, spend: Callable[[int], None] | None = None) -> bytes:
        """The body behind a URL, after at most max_redirects.

        spend is told of every chunk's length as it arrives, and may raise ImageError.
        Raises ImageError for whatever goes wrong, within fetch_timeout_s of its start.
        """
        timeout_s = self._settings.fetch_timeout_s
        async with self._slots:
            try:
                async with asyncio.timeout(timeout_s):
                    return await self._follow(source, spend or _free)
            except (TimeoutError, httpcore2.TimeoutException):
                raise ImageError(f"image URL took over {timeout_s:g} s to download") from None
            except (httpcore2.NetworkError, OSError):
                raise ImageError(UNREACHABLE) from None
            except (httpcore2.ProtocolError, httpcore2.UnsupportedProtocol, ValueError):
                raise ImageError("image URL's server broke off or sent no valid HTTP") from None

    async def _follow(self, source: RemoteImage, spend: Callable[[int], None]) -> bytes:
        for _ in range(self._settings.max_redirects + 1):
            found = await self._get(source, spend)
            if isinstance(found, bytes):
                return found
            source = found
        raise ImageError(f"image URL redirects more than {self._settings.max_redirects} times")

    async def _get(self, source: RemoteImage, spend: Callable[[int], None]) -> bytes | RemoteImage:
        """One hop: the body, or where to go next."""
        async with self._pool.stream("GET", _target(source), headers=_headers(source)) as response:
            headers = {name.lower(): value for name, value in response.headers}
            if response.status in REDIRECTS:
                return self._next_hop(source, headers.get(b"location", b""))
            if response.status != 200:
                raise ImageError(f"image URL's server answered with status {response.status}")
            if headers.get(b"content-encoding", b"identity").strip().lower() not in PLAIN:
                raise ImageError("image URL's server sent a compressed body, which is not taken")
            return await self._read(response, headers.get(b"content-length", b""), spend)

    async def _read(
        self, response: httpcore2.Response, length: bytes, spend: Callable[[int], None]
    ) -> bytes:
        """The body, refused as soon as it is declared or found to be too large."""
        limit = self._settings.max_image_bytes
        if length.isdigit() and int(length) > limit:
            raise ImageError(too_large(int(length), limit))
        body = bytearray()
        async for chunk in response.aiter_stream():
            spend(len(chunk))
            body += chunk
            if len(body) > limit:
                raise ImageError(f"image has over {limit:,} bytes, the limit: send a smaller file")
        if not body:
            raise ImageError("image URL's server sent no data")
        return bytes(body)

    def _next_hop(self, source: RemoteImage, location: bytes) -> RemoteImage:
        """Where a redirect leads, read as strictly as the client's own URL."""
        if not location:
            raise ImageError("image URL redirects to nowhere")
        try:
            url = urljoin(source.url, location.decode("ascii"))
            target = parse_remote_url(url, self._settings.max_url_chars)
        except ImageError as error:
            raise ImageError(f"image URL redirects to a place that is refused: {error}") from None
        except ValueError:
            raise ImageError("image URL redirects to a URL that cannot be read") from None
        if source.scheme == "https" and target.scheme != "https":
            raise ImageError("image URL redirects from https to http, which is refused")
        return target


def _free(_: int) -> None:
    """The budget of a fetch that has none."""


def _target(source: RemoteImage) -> httpcore2.URL:
    """The parts as they were parsed: no text is read a second time."""
    return httpcore2.URL(
        scheme=source.scheme.encode("ascii"),
        host=source.host.encode("ascii"),
        port=source.port,
        target=source.target.encode("ascii"),
    )


def _headers(source: RemoteImage) -> list[tuple[bytes, bytes]]:
    return [
        (b"Host", source.authority.encode("ascii")),
        (b"User-Agent", USER_AGENT),
        (b"Accept", b"image/*"),
        (b"Accept-Encoding", b"identity"),
        (b"Connection", b"close"),
    ]
