"""Looks up the host names of image URLs.

Owns the resolver, the time that a name may take, the places that keys share, and a short memory of
failures. A name that does not exist is the client's mistake; a name server that does not answer is
not. Knows nothing of which addresses are allowed, or of connections.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from ..admission.fair_lane import FairLane, LaneLimits
from ..admission.lanes import NAME_LOOKUPS
from ..errors import DeadlineError
from .settings import ImageError

if TYPE_CHECKING:
    import aiodns

LOOKUP_TIMEOUT_S = 2.0
# c-ares doubles the time of the second try.
FIRST_TRY_S = 0.7
NUM_TRIES = 2
# Of which one key gets half.
MAX_LOOKUPS = 128
FAILURE_AGE_S = 5.0
MAX_FAILURES = 1_000
UNRESOLVED = "image URL's host name cannot be resolved"
NO_ANSWER = (
    f"the name servers of an image URL's host did not answer within {LOOKUP_TIMEOUT_S:g} s: try "
    "again, or send the image as a data URL"
)
# c-ares' codes for a name that does not exist, or has no address: ARES_ENODATA, ARES_ENOTFOUND and
# ARES_EBADNAME of ares.h.
_NOT_FOUND = frozenset({1, 4, 8})


class Resolver(Protocol):
    """Looks up names."""

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        """The IP addresses of a host.

        Raises TimeoutError if no name server answers, another OSError if there are none.
        """


class DnsResolver:
    """Asks the system's name servers directly; also reads /etc/hosts.

    getaddrinfo would block a thread of the worker's pool for each silent name.
    nameservers: `address:port` of others, for tests.
    """

    def __init__(self, nameservers: Sequence[str] | None = None) -> None:
        self._nameservers = nameservers
        self._resolver: aiodns.DNSResolver | None = None

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        # Loaded and started by the first lookup, in the event loop that it belongs to.
        import aiodns

        if self._resolver is None:
            self._resolver = aiodns.DNSResolver(
                nameservers=self._nameservers, timeout=FIRST_TRY_S, tries=NUM_TRIES
            )
        try:
            found = await self._resolver.getaddrinfo(host, port=port)
        except aiodns.error.DNSError as error:
            if error.args[0] in _NOT_FOUND:
                raise OSError("the name does not exist") from None
            raise TimeoutError("the name servers gave no answer") from None
        addresses = [node.addr[0].decode("ascii", "replace") for node in found.nodes]
        return list(dict.fromkeys(addresses))

    async def close(self) -> None:
        """End all lookups."""
        if self._resolver is not None:
            await self._resolver.close()


class NameLookups:
    """Lookups with a time limit, which keys share fairly.

    lane: which key looks up next, with MAX_LOOKUPS places. clock: seconds, monotonic.
    """

    def __init__(
        self,
        resolver: Resolver,
        lane: FairLane | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._resolver = resolver
        self._clock = clock
        self._lane = lane or FairLane(NAME_LOOKUPS, LaneLimits(MAX_LOOKUPS, keeps_room=True))
        # host -> when it failed, and whether the name does not exist.
        self._failures: OrderedDict[str, tuple[float, bool]] = OrderedDict()

    async def look_up(self, host: str, port: int, tenant: str) -> Sequence[str]:
        """The addresses of a host; at least one.

        Raises ImageError if the name does not exist, DeadlineError if no name server answers in
        time, OverloadedError if too many lookups wait. A failure is remembered for a moment.
        """
        self._raise_remembered(host)
        async with self._lane.place(tenant):
            try:
                async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                    addresses = await self._resolver.resolve(host, port)
            except TimeoutError:
                self._remember(host, is_missing=False)
            except (OSError, UnicodeError):
                self._remember(host, is_missing=True)
            else:
                if addresses:
                    return addresses
                self._remember(host, is_missing=True)
        self._raise_remembered(host)
        raise AssertionError("a failure was remembered just now")

    def _remember(self, host: str, *, is_missing: bool) -> None:
        self._failures[host] = (self._clock(), is_missing)
        self._failures.move_to_end(host)
        if len(self._failures) > MAX_FAILURES:
            self._failures.popitem(last=False)

    def _raise_remembered(self, host: str) -> None:
        failed_at, is_missing = self._failures.get(host, (0.0, False))
        if host not in self._failures or self._clock() - failed_at > FAILURE_AGE_S:
            self._failures.pop(host, None)
        elif is_missing:
            raise ImageError(UNRESOLVED)
        else:
            raise DeadlineError(NO_ANSWER, retry_after_s=FAILURE_AGE_S)
