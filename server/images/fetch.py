"""Fetches images from http(s) URLs, and never from an address that clients must not reach.

Owns the network backend that opens every connection. It checks each address of a name and
connects to the checked address itself, so that a second lookup cannot give another one. TLS
still verifies the name. Redirects are followed here, and each hop is checked like the first.
Requests carry no cookie, credential or proxy: the connection pool has none and reads no
environment. Knows nothing of image formats.
"""

from __future__ import annotations

import asyncio
import contextlib
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
# Per address, so that an address that does not answer leaves time for the next.
CONNECT_TIMEOUT_S = 3.0
PLAIN = {b"", b"identity"}
NOT_PUBLIC = (
    "image URL's host is not a public address: private, loopback, link-local and other special "
    "addresses are not allowed"
)
ODD_SPELLING = "image URL's host is a number but not a plain IP address: write the address in full"
UNRESOLVED = "image URL's host name cannot be resolved"
BROKEN_ANSWER = "image URL's server closed the connection early or sent invalid HTTP"
UNREACHABLE = "image URL's server cannot be reached"


class Resolver(Protocol):
    """Looks up names."""

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        """The IP addresses of a host. Raises OSError if there are none."""


class Connector(Protocol):
    """Opens connections to checked addresses."""

    async def connect(
        self, address: str, port: int, timeout_s: float | None
    ) -> httpcore2.AsyncNetworkStream:
        """A stream to the address. Raises httpcore2.ConnectError or ConnectTimeout."""


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
    """Opens every outgoing connection, for the hosts of URLs and of redirects."""

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
        """A stream to the first address of the host that answers; all are checked before.

        Raises ImageError if any address is not allowed, ConnectError if none answers.
        """
        addresses = await self._checked_addresses(host, port)
        timeout_s = CONNECT_TIMEOUT_S if timeout is None else timeout
        for address in addresses[:MAX_ADDRESSES]:
            with contextlib.suppress(httpcore2.ConnectError, httpcore2.ConnectTimeout, OSError):
                return await self._connector.connect(str(address), port, timeout_s)
        raise httpcore2.ConnectError(UNREACHABLE)

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        raise httpcore2.ConnectError("images are never fetched over Unix sockets")

    async def _checked_addresses(self, host: str, port: int) -> list[Address]:
        """All addresses of the host. If one is not allowed, the host is not."""
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

    resolver and connector replace DNS and TCP in tests; ssl_context replaces the system's
    certificates. A redirect may not lead from https to http. Close it when done.
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
        # Connections are not reused: their address was checked for an older answer of the name.
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

        spend: called with the length of each chunk as it arrives; it may raise ImageError.
        Raises ImageError for every failure, within fetch_timeout_s of its start.
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
                raise ImageError(BROKEN_ANSWER) from None

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
                raise ImageError("image URL's server sent a compressed body: not supported")
            return await self._read(response, headers.get(b"content-length", b""), spend)

    async def _read(
        self, response: httpcore2.Response, length: bytes, spend: Callable[[int], None]
    ) -> bytes:
        """The body; rejected as soon as its declared or actual size is over the limit."""
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
        """The target of a redirect, checked as strictly as the client's own URL."""
        if not location:
            raise ImageError("image URL redirects without naming a location")
        try:
            url = urljoin(source.url, location.decode("ascii"))
            target = parse_remote_url(url, self._settings.max_url_chars)
        except ImageError as error:
            raise ImageError(f"image URL redirects to a URL that is not allowed: {error}") from None
        except ValueError:
            raise ImageError("image URL redirects to a URL that cannot be read") from None
        if source.scheme == "https" and target.scheme != "https":
            raise ImageError("image URL redirects from https to http, which is not allowed")
        return target


def _free(_: int) -> None:
    """The budget of a fetch without a limit of its own."""


def _target(source: RemoteImage) -> httpcore2.URL:
    """The URL in the parts that were parsed and checked: it is not parsed again."""
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
