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
import ssl
from collections.abc import AsyncIterator, Callable, Iterable
from contextvars import ContextVar
from ipaddress import ip_address
from typing import Protocol
from urllib.parse import urljoin

import httpcore2

from ...router.processes.tasks import finish
from ..admission.fair_lane import FairLane, LaneLimits
from ..admission.lanes import IMAGE_FETCHES
from .addresses import Address, is_allowed, parse_literal
from .names import UNRESOLVED, DnsResolver, NameLookups, Resolver
from .settings import ImageError, ImageSettings
from .sources import RemoteImage, parse_remote_url, too_large

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
BROKEN_ANSWER = "image URL's server closed the connection early or sent invalid HTTP"
UNREACHABLE = "image URL's server cannot be reached"


class Connector(Protocol):
    """Opens connections to checked addresses."""

    async def connect(
        self, address: str, port: int, timeout_s: float | None
    ) -> httpcore2.AsyncNetworkStream:
        """A stream to the address. Raises httpcore2.ConnectError or ConnectTimeout."""


class TcpConnector:
    """Plain TCP connections."""

    def __init__(self) -> None:
        self._backend = httpcore2.AnyIOBackend()

    async def connect(
        self, address: str, port: int, timeout_s: float | None
    ) -> httpcore2.AsyncNetworkStream:
        return await self._backend.connect_tcp(address, port, timeout=timeout_s)


# The host that this task looked up, and its checked addresses: the task connects to these.
_looked_up: ContextVar[tuple[str, list[Address]] | None] = ContextVar("looked_up", default=None)


class GuardedBackend(httpcore2.AsyncNetworkBackend):
    """Opens every outgoing connection, for the hosts of URLs and of redirects."""

    def __init__(self, names: NameLookups, connector: Connector, allow_private: bool) -> None:
        self._names = names
        self._connector = connector
        self._allow_private = allow_private

    async def look_up(self, host: str, port: int, tenant: str) -> None:
        """Look up and check the addresses to which this task connects next.

        It needs no place among the downloads: a name without an answer delays no other request.
        Raises ImageError if any address is not allowed, and as `NameLookups.look_up`.
        """
        _looked_up.set((host, await self._checked_addresses(host, port, tenant)))

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
        looked_up = _looked_up.get()
        if looked_up is None or looked_up[0] != host:
            await self.look_up(host, port, "")
            looked_up = _looked_up.get()
        assert looked_up is not None, "it was looked up just now"
        _, addresses = looked_up
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

    async def _checked_addresses(self, host: str, port: int, tenant: str) -> list[Address]:
        """All addresses of the host. If one is not allowed, the host is not."""
        try:
            literal = parse_literal(host)
        except ValueError:
            raise ImageError(ODD_SPELLING) from None
        addresses = [literal] if literal is not None else await self._resolve(host, port, tenant)
        if not all(is_allowed(found, allow_private=self._allow_private) for found in addresses):
            raise ImageError(NOT_PUBLIC)
        return addresses

    async def _resolve(self, host: str, port: int, tenant: str) -> list[Address]:
        texts = await self._names.look_up(host, port, tenant)
        try:
            return [ip_address(text) for text in texts]
        except ValueError:
            raise ImageError(UNRESOLVED) from None


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
        lane: FairLane | None = None,
        names_lane: FairLane | None = None,
    ) -> None:
        """lane: which key downloads next, with max_concurrent_fetches places.

        names_lane: the same of name lookups.
        """
        self._settings = settings
        limits = LaneLimits(settings.max_concurrent_fetches, keeps_room=True)
        self._lane = lane or FairLane(IMAGE_FETCHES, limits)
        self._own_resolver = DnsResolver()
        self._backend = GuardedBackend(
            NameLookups(resolver or self._own_resolver, names_lane),
            connector or TcpConnector(),
            settings.allow_private_addresses,
        )
        # Connections are not reused: their address was checked for an older answer of the name.
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=ssl_context or httpcore2.default_ssl_context(),
            max_connections=settings.max_concurrent_fetches,
            max_keepalive_connections=0,
            network_backend=self._backend,
        )

    async def close(self) -> None:
        """Close all connections and end all lookups."""
        await self._pool.aclose()
        await self._own_resolver.close()

    async def fetch(
        self,
        source: RemoteImage,
        spend: Callable[[int], None] | None = None,
        owner: str = "",
        *,
        is_first: bool = True,
    ) -> bytes:
        """The body behind a URL, after at most max_redirects.

        spend: called with the length of each chunk as it arrives; it may raise.
        owner, is_first: as `DecoderPool.decode` has them.
        Raises ImageError for every failure of the URL or its server, which has fetch_timeout_s
        for all hops together. Waiting for name servers or for a place among the downloads does
        not count. Raises DeadlineError or OverloadedError if a name server or a place is missing.
        """
        loop = asyncio.get_running_loop()
        left_s = self._settings.fetch_timeout_s
        for _ in range(self._settings.max_redirects + 1):
            await self._backend.look_up(source.host, source.port, owner)
            async with self._lane.place(owner, is_bounded=is_first):
                is_first = False
                started = loop.time()
                found = await self._get_within(source, spend or _free, left_s)
            left_s -= loop.time() - started
            if isinstance(found, bytes):
                return found
            source = found
        raise ImageError(f"image URL redirects more than {self._settings.max_redirects} times")

    async def _get_within(
        self, source: RemoteImage, spend: Callable[[int], None], left_s: float
    ) -> bytes | RemoteImage:
        """One hop; raises ImageError for every failure of the URL's server."""
        timeout_s = self._settings.fetch_timeout_s
        try:
            async with asyncio.timeout(left_s):
                return await self._get(source, spend)
        except (TimeoutError, httpcore2.TimeoutException):
            raise ImageError(f"image URL took over {timeout_s:g} s to download") from None
        except (httpcore2.NetworkError, OSError):
            raise ImageError(UNREACHABLE) from None
        except (httpcore2.ProtocolError, httpcore2.UnsupportedProtocol, ValueError):
            raise ImageError(BROKEN_ANSWER) from None

    async def _get(self, source: RemoteImage, spend: Callable[[int], None]) -> bytes | RemoteImage:
        """One hop: the body, or where to go next."""
        async with self._response(source) as response:
            headers = {name.lower(): value for name, value in response.headers}
            if response.status in REDIRECTS:
                return self._next_hop(source, headers.get(b"location", b""))
            if response.status != 200:
                raise ImageError(f"image URL's server answered with status {response.status}")
            if headers.get(b"content-encoding", b"identity").strip().lower() not in PLAIN:
                raise ImageError("image URL's server sent a compressed body: not supported")
            return await self._read(response, headers.get(b"content-length", b""), spend)

    @contextlib.asynccontextmanager
    async def _response(self, source: RemoteImage) -> AsyncIterator[httpcore2.Response]:
        """The response's head; closed completely at the end, also if this task is cancelled.

        Cancelled while it closes, the pool would keep the request for ever (11 KB each).
        """
        request = httpcore2.Request("GET", _target(source), headers=self._headers(source))
        response = await self._pool.handle_async_request(request)
        try:
            yield response
        finally:
            await finish(response.aclose())

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

    def _headers(self, source: RemoteImage) -> list[tuple[bytes, bytes]]:
        return [
            (b"Host", source.authority.encode("ascii")),
            (b"User-Agent", self._settings.user_agent.encode("ascii")),
            (b"Accept", b"image/*"),
            (b"Accept-Encoding", b"identity"),
            (b"Connection", b"close"),
        ]

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
    """The budget of a fetch without its own limit."""


def _target(source: RemoteImage) -> httpcore2.URL:
    """The URL in the parts that were parsed and checked: it is not parsed again."""
    return httpcore2.URL(
        scheme=source.scheme.encode("ascii"),
        host=source.host.encode("ascii"),
        port=source.port,
        target=source.target.encode("ascii"),
    )
