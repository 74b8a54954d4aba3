"""Host names of image URLs: whose fault a failure is, and what silent names cost other keys."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from support.guarded import guarded_server
from support.http_side import NO_AUTHORITIES, write_checkpoint
from support.outside import BODY, PUBLIC, LoopbackConnector, Site, plain_response
from support.polling import FAR_S, until

from vlmserve.server.errors import DeadlineError
from vlmserve.server.images import names
from vlmserve.server.images.fetch import ImageFetcher
from vlmserve.server.images.names import MAX_LOOKUPS, DnsResolver, NameLookups
from vlmserve.server.images.settings import ImageError, ImageSettings
from vlmserve.server.images.sources import parse_remote_url

NXDOMAIN, SERVFAIL = 3, 2


class SilentResolver:
    """Answers `pictures.example`; of other names none answers, but missing ones do not exist."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.num_waiting = 0

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        if host == "pictures.example":
            return [PUBLIC]
        if host.startswith("missing"):
            raise OSError("unknown name")
        self.num_waiting += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.num_waiting -= 1
        return []


class NameServer(asyncio.DatagramProtocol):
    """A name server on loopback: the first label of a name says what it answers."""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        label = data[13 : 13 + data[12]].decode()
        end = data.index(b"\0", 12) + 5
        is_a = data[end - 4 : end - 2] == b"\0\x01"
        if label == "silent":
            return
        code = {"missing": NXDOMAIN, "broken": SERVFAIL}.get(label, 0)
        num_answers = 1 if label == "good" and is_a else 0
        head = (
            data[:2] + bytes([0x81, 0x80 | code]) + b"\0\x01" + bytes([0, num_answers]) + bytes(4)
        )
        answer = b"\xc0\x0c\0\x01\0\x01\0\0\0\x3c\0\x04" + bytes(map(int, PUBLIC.split(".")))
        self._transport.sendto(head + data[12:end] + answer * num_answers, addr)


@asynccontextmanager
async def name_server() -> AsyncIterator[DnsResolver]:
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(NameServer, ("127.0.0.1", 0))
    host, port = transport.get_extra_info("sockname")
    resolver = DnsResolver([f"{host}:{port}"])
    try:
        yield resolver
    finally:
        await resolver.close()
        transport.close()


def resolve(host: str) -> Sequence[str]:
    async def run() -> Sequence[str]:
        async with name_server() as resolver, asyncio.timeout(FAR_S):
            return await resolver.resolve(host, 80)

    return asyncio.run(run())


def test_the_resolver_tells_a_missing_name_from_a_server_that_does_not_answer() -> None:
    """getaddrinfo gave one error for both, and the client got a 400 for either."""
    pytest.importorskip("aiodns")
    assert resolve("good.example") == [PUBLIC]
    for host in ("missing.example", "empty.example"):
        with pytest.raises(OSError, match="does not exist"):
            resolve(host)
    for host in ("broken.example", "silent.example"):
        with pytest.raises(TimeoutError):
            resolve(host)


def test_failures_are_remembered_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "LOOKUP_TIMEOUT_S", 0.01)
    now = [0.0]
    resolver = SilentResolver()
    lookups = NameLookups(resolver, clock=lambda: now[0])

    async def ask(host: str, error: type[Exception]) -> None:
        with pytest.raises(error):
            await lookups.look_up(host, 80, "key")

    async def run() -> None:
        for moment in (0.0, 4.0, 6.0):
            now[0] = moment
            await ask("silent.example", DeadlineError)
            await ask("missing.example", ImageError)

    asyncio.run(run())
    assert resolver.asked == ["silent.example", "missing.example"] * 2


def test_only_so_many_failures_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "MAX_FAILURES", 10)
    lookups = NameLookups(SilentResolver())

    async def run() -> None:
        for number in range(50):
            with pytest.raises(ImageError):
                await lookups.look_up(f"missing{number}", 80, "key")

    asyncio.run(run())
    assert len(lookups._failures) == 10


@asynccontextmanager
async def fetcher_of(resolver: SilentResolver) -> AsyncIterator[ImageFetcher]:
    """A fetcher of a site that answers BODY."""
    server = await asyncio.start_server(Site({"/a": plain_response()}), "127.0.0.1", 0)
    fetcher = ImageFetcher(
        ImageSettings(),
        resolver=resolver,
        connector=LoopbackConnector(server.sockets[0].getsockname()[1]),
        ssl_context=NO_AUTHORITIES,
    )
    async with server, asyncio.timeout(FAR_S):
        yield fetcher
        await fetcher.close()


def silent_fetches(fetcher: ImageFetcher, count: int) -> list[asyncio.Task[bytes]]:
    urls = [f"http://silent{number}.example/a" for number in range(count)]
    return [
        asyncio.create_task(fetcher.fetch(parse_remote_url(url, 100), owner="one")) for url in urls
    ]


def test_row_17_48_silent_names_of_one_key_cost_another_key_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every picture by URL failed for 90 s, with a 400 that blamed the client."""
    monkeypatch.setattr(names, "LOOKUP_TIMEOUT_S", FAR_S)

    async def run() -> None:
        resolver = SilentResolver()
        async with fetcher_of(resolver) as fetcher:
            silent = silent_fetches(fetcher, 48)
            await until(lambda: resolver.num_waiting == 48)
            source = parse_remote_url("http://pictures.example/a", 100)
            assert await fetcher.fetch(source, owner="other") == BODY
            assert resolver.num_waiting == 48, "the others still wait"
            for task in silent:
                task.cancel()
            await asyncio.gather(*silent, return_exceptions=True)
            assert resolver.num_waiting == 0

    asyncio.run(run())


def test_more_silent_names_than_places_do_not_delay_another_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In events: the other key's name is asked at once, in the half that is kept free."""
    monkeypatch.setattr(names, "LOOKUP_TIMEOUT_S", 0.5)

    async def run() -> None:
        resolver = SilentResolver()
        async with fetcher_of(resolver) as fetcher:
            silent = silent_fetches(fetcher, MAX_LOOKUPS)
            await until(lambda: resolver.num_waiting == MAX_LOOKUPS // 2)
            source = parse_remote_url("http://pictures.example/a", 100)
            assert await fetcher.fetch(source, owner="other") == BODY
            place = resolver.asked.index("pictures.example")
            assert place <= MAX_LOOKUPS // 2 + 1
            results = await asyncio.gather(*silent, return_exceptions=True)
            assert {type(result) for result in results} == {DeadlineError}

    asyncio.run(run())


def test_a_client_reads_whether_its_name_or_a_name_server_failed(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "LOOKUP_TIMEOUT_S", 0.05)
    with guarded_server(write_checkpoint(tmp_path)) as server:
        server.outside.resolver = SilentResolver()  # type: ignore[assignment]
        monkeypatch.setattr(server.outside, "script", lambda site, names: None)
        silent = server.ask(["http://silent.example/a"])
        missing = server.ask(["http://missing.example/a"])
    for answer in silent.answers:
        assert (answer.status_code, answer.headers["retry-after"]) == (504, "5")
        assert "did not answer" in answer.json()["message"]
    assert all("cannot be resolved" in message for message in missing.messages())
