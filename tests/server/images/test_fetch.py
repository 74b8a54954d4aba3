"""Fetching images: where it never connects, and how it bounds what comes back.

No packet leaves the machine: names are resolved by a script, and every connection
goes to a server on loopback, whatever address was judged.
"""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace

import httpcore2
import pytest
from support.http_side import NO_AUTHORITIES
from support.outside import (
    BODY,
    FORBIDDEN,
    PUBLIC,
    Handler,
    LoopbackConnector,
    ScriptedResolver,
    Site,
    drip,
    endless,
    plain_response,
    redirect,
)

from vlmserve import __version__
from vlmserve.server.images.addresses import is_allowed, parse_literal
from vlmserve.server.images.fetch import GuardedBackend, ImageFetcher
from vlmserve.server.images.names import NameLookups
from vlmserve.server.images.settings import ImageError, ImageSettings, default_user_agent
from vlmserve.server.images.sources import parse_remote_url

TLS_FILE = Path(__file__).resolve().parents[2] / "data" / "tls_test_only.pem"


class Outcome:
    """What a fetch gave, and whom it asked on the way."""

    def __init__(self, body: bytes | None, error: ImageError | None) -> None:
        self.body = body
        self.error = error
        self.connected: list[tuple[str, int]] = []
        self.asked: list[str] = []

    @property
    def message(self) -> str:
        assert self.error is not None, "the fetch succeeded"
        return self.error.message


def fetch(
    url: str,
    site: Site | None = None,
    *,
    answers: dict[str, list[list[str]]] | None = None,
    settings: ImageSettings | None = None,
    dead: Sequence[str] = (),
    server_tls: ssl.SSLContext | None = None,
    client_tls: ssl.SSLContext = NO_AUTHORITIES,
    spend: Callable[[int], None] | None = None,
) -> Outcome:
    """Fetch one URL from a site on loopback (or from nobody)."""

    async def run() -> Outcome:
        settings_ = settings or ImageSettings()
        server = await asyncio.start_server(site or Site({}), "127.0.0.1", 0, ssl=server_tls)
        port = server.sockets[0].getsockname()[1]
        resolver = ScriptedResolver(answers or {"pictures.example": [[PUBLIC]]})
        connector = LoopbackConnector(port if site is not None else None, dead)
        fetcher = ImageFetcher(
            settings_, resolver=resolver, connector=connector, ssl_context=client_tls
        )
        try:
            source = parse_remote_url(url, settings_.max_url_chars)
            outcome = Outcome(await fetcher.fetch(source, spend), None)
        except ImageError as error:
            outcome = Outcome(None, error)
        finally:
            await fetcher.close()
            server.close()
            await server.wait_closed()
        outcome.connected, outcome.asked = connector.connected, resolver.asked
        return outcome

    return asyncio.run(run())


ALLOWED = ["93.184.215.14", "8.8.8.8", "172.15.0.1", "172.32.0.1", "100.63.255.255", "11.0.0.1",
           "2606:4700::1111", "2a00:1450:4001::200e", "2400:cb00::1"]  # fmt: skip


@pytest.mark.parametrize("address", FORBIDDEN)
def test_special_addresses_are_refused(address: str) -> None:
    assert not is_allowed(ip_address(address), allow_private=False)


@pytest.mark.parametrize("address", ALLOWED)
def test_public_addresses_are_allowed(address: str) -> None:
    assert is_allowed(ip_address(address), allow_private=False)
    assert is_allowed(ip_address(address), allow_private=True)


def test_private_addresses_can_be_opened_but_never_those_of_metadata_services() -> None:
    for text in ("127.0.0.1", "10.1.2.3", "192.168.0.9", "100.64.0.1", "::1", "fd12::1"):
        assert is_allowed(ip_address(text), allow_private=True), text
    for text in ("169.254.169.254", "fe80::1", "fd00:ec2::254", "100.100.100.200", "0.0.0.0",
                 "224.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254"):  # fmt: skip
        assert not is_allowed(ip_address(text), allow_private=True), text


def test_whatever_python_calls_private_is_refused() -> None:
    """The lists here against the standard library's own, on random addresses of all kinds."""
    rng = random.Random(3)
    for _ in range(20_000):
        address = ip_address(rng.getrandbits(32))
        if is_allowed(address, allow_private=False):
            assert address.is_global, address
            assert not address.is_multicast, address
            assert not address.is_reserved, address
    for _ in range(20_000):
        address = ip_address(rng.getrandbits(128) | (rng.getrandbits(3) << 125))
        if is_allowed(address, allow_private=False):
            assert address.is_global, address


@pytest.mark.parametrize(
    "host",
    [
        "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1", "127.1", "127.0.1", "0",
        "017700000001", "1.2.3.4.5", "127.0.0.1.", "0x", "foo.0x7f", "foo.1", "256.1.1.1",
        "127.0.0.01", "4294967295", "00000000.0.0.0", "0.0.0.0x0", "1::2::3",
    ],
)  # fmt: skip
def test_odd_spellings_of_addresses_are_neither_names_nor_addresses(host: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # ipaddress says it in several ways
        parse_literal(host)


def test_names_are_not_taken_for_addresses() -> None:
    for host in (
        "pictures.example",
        "1.example",
        "0x7f.example",
        "a",
        "xn--1",
        "face",
        "1e100.net",
    ):
        assert parse_literal(host) is None, host


LITERAL_URLS = [
    f"http://[{address}]/" if ":" in address else f"http://{address}/"
    for address in FORBIDDEN
    if "%" not in address
]


@pytest.mark.parametrize("url", LITERAL_URLS)
def test_url_of_a_forbidden_address_is_refused_without_a_connection(url: str) -> None:
    outcome = fetch(url)
    assert "not a public address" in outcome.message
    assert outcome.connected == []
    assert outcome.asked == []


@pytest.mark.parametrize(
    "host", ["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0x7f.1", "127.0.0.1."]
)
def test_odd_spelling_of_an_address_is_refused_without_asking_the_resolver(host: str) -> None:
    outcome = fetch(f"http://{host}/", answers={host: [[PUBLIC]]})
    assert outcome.message.startswith("image URL")
    assert outcome.connected == outcome.asked == []


@pytest.mark.parametrize("address", FORBIDDEN)
def test_name_that_resolves_to_a_forbidden_address_is_refused(address: str) -> None:
    outcome = fetch("http://pictures.example/", answers={"pictures.example": [[address]]})
    assert outcome.message.startswith("image URL")
    assert outcome.connected == []


def test_one_forbidden_address_among_good_ones_refuses_the_name() -> None:
    for answer in ([PUBLIC, "10.0.0.1"], ["::1", PUBLIC], [PUBLIC] * 7 + ["127.0.0.1"]):
        outcome = fetch("http://pictures.example/", answers={"pictures.example": [answer]})
        assert "not a public address" in outcome.message
        assert outcome.connected == []


@pytest.mark.parametrize("answer", [[], ["no address"]])
def test_answer_without_addresses_is_unresolved(answer: list[str]) -> None:
    outcome = fetch("http://pictures.example/", answers={"pictures.example": [answer]})
    assert "cannot be resolved" in outcome.message


def test_unknown_name_is_unresolved_and_not_repeated() -> None:
    message = fetch("http://secret-internal.example/?key=1").message
    assert "cannot be resolved" in message
    assert "secret" not in message


def test_fetch_connects_to_the_judged_address_itself() -> None:
    """An answer that changes between the check and the connection changes nothing."""
    answers = {"pictures.example": [[PUBLIC], ["127.0.0.1"]]}
    outcome = fetch("http://pictures.example/a", Site({"/a": plain_response()}), answers=answers)
    assert outcome.body == BODY
    assert outcome.connected == [(PUBLIC, 80)]
    assert outcome.asked == ["pictures.example"]


def test_second_fetch_is_judged_anew() -> None:
    """Kept connections would let an answer that has turned bad live on, or a good one vouch."""

    async def run() -> list[str]:
        site = Site({"/a": plain_response()})
        server = await asyncio.start_server(site, "127.0.0.1", 0)
        resolver = ScriptedResolver({"pictures.example": [[PUBLIC], ["10.0.0.1"]]})
        connector = LoopbackConnector(server.sockets[0].getsockname()[1])
        fetcher = ImageFetcher(
            ImageSettings(), resolver=resolver, connector=connector, ssl_context=NO_AUTHORITIES
        )
        source = parse_remote_url("http://pictures.example/a", 100)
        assert await fetcher.fetch(source) == BODY
        with pytest.raises(ImageError, match="not a public"):
            await fetcher.fetch(source)
        await fetcher.close()
        server.close()
        await server.wait_closed()
        return [address for address, _ in connector.connected]

    assert asyncio.run(run()) == [PUBLIC]


def test_next_address_is_tried_when_one_does_not_answer() -> None:
    answers = {"pictures.example": [["8.8.8.8", PUBLIC]]}
    site = Site({"/a": plain_response()})
    outcome = fetch("http://pictures.example/a", site, answers=answers, dead=["8.8.8.8"])
    assert outcome.body == BODY
    assert outcome.connected == [("8.8.8.8", 80), (PUBLIC, 80)]


def test_only_a_few_addresses_are_tried() -> None:
    answers = {"pictures.example": [[f"8.8.8.{n}" for n in range(1, 100)]]}
    outcome = fetch("http://pictures.example/a", answers=answers)
    assert "cannot be reached" in outcome.message
    assert len(outcome.connected) == 4


def test_unix_sockets_are_out_of_reach() -> None:
    backend = GuardedBackend(
        NameLookups(ScriptedResolver({})), LoopbackConnector(), allow_private=True
    )
    with pytest.raises(httpcore2.ConnectError):
        asyncio.run(backend.connect_unix_socket("/run/x.sock"))


def test_private_address_is_reached_where_the_operator_allows_it() -> None:
    settings = ImageSettings(allow_private_addresses=True)
    site = Site({"/a": plain_response()})
    outcome = fetch("http://10.0.0.7:8080/a", site, settings=settings)
    assert outcome.body == BODY
    assert outcome.connected == [("10.0.0.7", 8080)]
    outcome = fetch("http://169.254.169.254/latest/meta-data", site, settings=settings)
    assert "not a public" in outcome.message
    assert outcome.connected == []


def test_request_carries_nothing_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cookie, credential or referrer, and no proxy or .netrc of the environment."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    site = Site({"/a?b=c": plain_response(headers="Set-Cookie: s=1\r\n"), "/d": plain_response()})
    outcome = fetch("http://pictures.example:8080/a?b=c", site)
    assert outcome.body == BODY
    lines = site.heads[0].rstrip().split("\r\n")
    assert lines[0] == "GET /a?b=c HTTP/1.1"
    names = [line.split(":")[0].lower() for line in lines[1:]]
    assert sorted(names) == ["accept", "accept-encoding", "connection", "host", "user-agent"]
    assert "Host: pictures.example:8080" in lines


def test_a_download_names_the_server_and_its_version() -> None:
    site = Site({"/a": plain_response()})
    assert fetch("http://pictures.example/a", site).body == BODY
    assert f"User-Agent: vlmserve/{__version__}" in site.heads[0]


def test_the_page_of_the_package_is_named_if_it_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    default_user_agent.cache_clear()
    package = SimpleNamespace(json={"home_page": "https://example.com/vlmserve"})
    monkeypatch.setattr("importlib.metadata.metadata", lambda name: package)
    assert default_user_agent() == f"vlmserve/{__version__} (+https://example.com/vlmserve)"
    default_user_agent.cache_clear()


def test_the_operator_names_the_agent_on_every_hop() -> None:
    agent = "captions/1.0 (+https://example.com; ops@example.com)"
    site = Site({"/a": redirect("/b", "302 F"), "/b": plain_response()})
    settings = ImageSettings(fetch_user_agent=agent)
    assert fetch("http://pictures.example/a", site, settings=settings).body == BODY
    assert [f"User-Agent: {agent}\r\n" in head for head in site.heads] == [True, True]


@pytest.mark.parametrize("agent", ["", " ", "a\r\nX: b", "é", "a" * 257, " a", "a\x7f"])
def test_an_agent_that_no_header_can_hold_is_one_line(agent: str) -> None:
    with pytest.raises(ValueError, match="--image-fetch-user-agent is"):
        ImageSettings(fetch_user_agent=agent)


def test_cookie_of_one_hop_is_not_sent_on_the_next() -> None:
    hop = plain_response(b"", "302 Found", "Location: /d\r\nSet-Cookie: s=1\r\n")
    site = Site({"/a": hop, "/d": plain_response()})
    assert fetch("http://pictures.example/a", site).body == BODY
    assert "ookie" not in "".join(site.heads)


@pytest.mark.parametrize("status", ["301 M", "302 F", "303 S", "307 T", "308 P"])
def test_redirects_are_followed(status: str) -> None:
    site = Site({"/a/b": redirect("../c?d=e#f", status), "/c?d=e": plain_response()})
    outcome = fetch("http://pictures.example/a/b", site)
    assert outcome.body == BODY
    assert outcome.asked == ["pictures.example"] * 2


def test_three_redirects_are_followed_and_four_are_not() -> None:
    chain: dict[str, bytes | Handler] = {f"/{n}": redirect(f"/{n + 1}") for n in range(4)}
    site = Site({**chain, "/4": plain_response()})
    assert fetch("http://pictures.example/1", site).body == BODY
    assert "more than 3 times" in fetch("http://pictures.example/0", site).message


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1/", "http://169.254.169.254/latest", "//10.0.0.1/", "http://[::1]/",
        "http://internal.example/", "http://2130706433/", "http://0x7f.1/",
        "http://[::ffff:127.0.0.1]/", "file:///etc/passwd", "ftp://pictures.example/",
        "gopher://pictures.example/", "data:image/png;base64,aGVs", "http://u:p@pictures.example/",
        "http://pictures.example:22/", "/a b", "/\\b", "http://pictures.example\\@x/", "",
        "http://[", "javascript:x", "/" + "a" * 9000, "/ü",
    ],
)  # fmt: skip
def test_redirect_to_a_refused_place_is_refused(location: str) -> None:
    site = Site({"/a": redirect(location)})
    answers = {"pictures.example": [[PUBLIC]], "internal.example": [["10.0.0.1"]]}
    outcome = fetch("http://pictures.example/a", site, answers=answers)
    assert outcome.message.startswith("image URL")
    assert outcome.connected == [(PUBLIC, 80)], "the second hop must not be connected to"


def test_redirect_with_a_name_that_turns_bad_is_refused() -> None:
    answers = {"pictures.example": [[PUBLIC], ["127.0.0.1"]]}
    outcome = fetch("http://pictures.example/a", Site({"/a": redirect("/b")}), answers=answers)
    assert "not a public address" in outcome.message
    assert outcome.connected == [(PUBLIC, 80)]


@pytest.mark.parametrize("status", ["204 No Content", "206 Partial", "304 Same", "404 No", "500 X"])
def test_status_other_than_200_is_named(status: str) -> None:
    body = b"" if status[:3] in ("204", "304") else BODY
    outcome = fetch("http://pictures.example/a", Site({"/a": plain_response(body, status)}))
    assert f"status {status[:3]}" in outcome.message


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "zstd", "gzip, identity"])
def test_compressed_body_is_refused(encoding: str) -> None:
    answer = plain_response(headers=f"Content-Encoding: {encoding}\r\n")
    assert "compressed" in fetch("http://pictures.example/a", Site({"/a": answer})).message


def test_empty_body_is_refused() -> None:
    assert (
        "no data" in fetch("http://pictures.example/a", Site({"/a": plain_response(b"")})).message
    )


SMALL = ImageSettings(max_image_bytes=1000)


def test_body_up_to_the_limit_is_taken() -> None:
    body = bytes(1000)
    site = Site({"/a": plain_response(body)})
    assert fetch("http://pictures.example/a", site, settings=SMALL).body == body


def test_declared_length_over_the_limit_is_refused_before_the_body() -> None:
    """The server never sends the body it declares: only the declaration can be the reason."""

    async def declare(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n")
        await reader.read()

    outcome = fetch("http://pictures.example/a", Site({"/a": declare}), settings=SMALL)
    assert "1,001 bytes" in outcome.message


async def endless_chunks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while not writer.is_closing():
        writer.write(b"1f4\r\n" + bytes(500) + b"\r\n")
        await writer.drain()


async def endless_head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while not writer.is_closing():
        writer.write(b"X: " + b"y" * 1000 + b"\r\n")
        await writer.drain()


@pytest.mark.parametrize("handler", [endless, endless_chunks])
def test_endless_body_is_cut_at_the_limit(handler: Handler) -> None:
    outcome = fetch("http://pictures.example/a", Site({"/a": handler}), settings=SMALL)
    assert "over 1,000 bytes" in outcome.message


def test_endless_head_is_cut() -> None:
    outcome = fetch("http://pictures.example/a", Site({"/a": endless_head}), settings=SMALL)
    assert "invalid HTTP" in outcome.message


def test_body_longer_than_declared_gives_what_was_declared() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n" + b"12345" + bytes(5000)
    outcome = fetch("http://pictures.example/a", Site({"/a": answer}), settings=SMALL)
    assert outcome.body == b"12345"


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n123",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x5\r\n12345\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n12345",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n12345",
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n12345",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 30 + b"\r\n12345",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n5\r\n12345\r\n0\r\n\r\n",
        b"HTTP/1.1 99999 OK\r\n\r\n12345",
        b"HTTP/1.1 \xff\xff\xff OK\r\n\r\n12345",
        b"no HTTP at all\r\n\r\n",
        b"",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    ],
)
def test_lying_or_broken_answers_are_refused(answer: bytes) -> None:
    outcome = fetch("http://pictures.example/a", Site({"/a": answer}), settings=SMALL)
    assert outcome.message.startswith("image URL")


def test_random_answers_give_bytes_or_an_image_error() -> None:
    """A small seeded sample of a fuzzer over heads and bodies."""
    rng = random.Random(4)
    pieces = [
        b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 302 F\r\n", b"HTTP/1.1 100 C\r\n\r\n", b"\r\n",
        b"\r\n\r\n", b"Location: /a\r\n", b"Location: //\xff\r\n", b"Content-Length: 3\r\n",
        b"abc", b"\x00", b": \r\n", b"Transfer-Encoding: chunked\r\n", b"3\r\nabc\r\n",
        b"0\r\n\r\n", b" folded\r\n", b"\xff\xfe",
        b"Content-Length: \xd9\xa3\r\n", b"Connection: upgrade\r\n", b"Upgrade: h2c\r\n",
    ]  # fmt: skip
    for _ in range(100):
        answer = pieces[0] * rng.randint(0, 1) + b"".join(rng.choices(pieces, k=rng.randint(0, 7)))
        outcome = fetch("http://pictures.example/a", Site({"/a": answer}), settings=SMALL)
        assert outcome.body or outcome.message.startswith("image URL"), answer


async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def informational(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while not writer.is_closing():
        writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("handler", [drip, silence, informational])
def test_slow_answer_ends_at_the_overall_deadline(handler: Handler) -> None:
    settings = ImageSettings(fetch_timeout_s=0.3)

    async def within_slack() -> Outcome:
        async with asyncio.timeout(10):
            return await asyncio.to_thread(
                fetch, "http://pictures.example/a", Site({"/a": handler}), settings=settings
            )

    assert "took over 0.3 s" in asyncio.run(within_slack()).message


def test_cancelled_fetch_frees_its_connection() -> None:
    """With room for one connection, a second fetch succeeds only if the first let go of it."""

    async def run() -> bytes:
        site = Site({"/slow": drip, "/a": plain_response()})
        server = await asyncio.start_server(site, "127.0.0.1", 0)
        connector = LoopbackConnector(server.sockets[0].getsockname()[1])
        fetcher = ImageFetcher(
            ImageSettings(max_concurrent_fetches=1),
            resolver=ScriptedResolver({"pictures.example": [[PUBLIC]]}),
            connector=connector,
        )
        slow = asyncio.create_task(
            fetcher.fetch(parse_remote_url("http://pictures.example/slow", 100))
        )
        await site.was_asked.wait()
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        async with asyncio.timeout(10):
            body = await fetcher.fetch(parse_remote_url("http://pictures.example/a", 100))
        await fetcher.close()
        server.close()
        await server.wait_closed()
        return body

    assert asyncio.run(run()) == BODY


def test_budget_is_told_of_bytes_as_they_come_and_may_stop_them() -> None:
    spent: list[int] = []

    def spend(num_bytes: int) -> None:
        spent.append(num_bytes)
        if sum(spent) > 700:
            raise ImageError("budget spent")

    outcome = fetch("http://pictures.example/a", Site({"/a": endless}), spend=spend)
    assert outcome.message == "budget spent"
    assert sum(spent) > 700


def server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS_FILE)
    return context


def client_context() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(TLS_FILE))


def test_https_verifies_the_name_while_connecting_to_the_judged_address() -> None:
    site = Site({"/a": plain_response()})
    outcome = fetch(
        "https://upload.wikimedia.org/a", site, answers={"upload.wikimedia.org": [[PUBLIC]]},
        server_tls=server_context(), client_tls=client_context(),
    )  # fmt: skip
    assert outcome.body == BODY
    assert outcome.connected == [(PUBLIC, 443)]
    assert "Host: upload.wikimedia.org\r\n" in site.heads[0]


@pytest.mark.parametrize(
    ("host", "is_trusted"), [("other.example", True), ("pictures.example", False)]
)
def test_wrong_name_or_unknown_authority_is_refused(host: str, is_trusted: bool) -> None:
    site = Site({"/a": plain_response()})
    outcome = fetch(
        f"https://{host}/a", site, answers={host: [[PUBLIC]]},
        server_tls=server_context(), client_tls=client_context() if is_trusted else NO_AUTHORITIES,
    )  # fmt: skip
    assert "cannot be reached" in outcome.message
    assert site.heads == []


def test_redirect_out_of_https_is_refused() -> None:
    site = Site({"/a": redirect("http://pictures.example/b"), "/b": plain_response()})
    outcome = fetch(
        "https://pictures.example/a", site, server_tls=server_context(),
        client_tls=client_context(),
    )  # fmt: skip
    assert "https to http" in outcome.message
    assert outcome.connected == [(PUBLIC, 443)]
