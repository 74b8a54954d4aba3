"""Which connection goes when there is no place, by the places alone and on a real server."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest
from support.http_side import write_checkpoint
from support.invariants import CHAT, assert_error
from support.raw_http import answers_in, exchange, only_answer, read_all
from support.threaded import server_in_thread

from vlmserve.server.http.connection_places import NUM_RESERVED_PLACES, ConnectionPlaces

MODELS = b"GET /v1/models HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
LIVE = b"GET /v1/health/live HTTP/1.1\r\nHost: a\r\n\r\n"


class Connection:
    def __init__(self, name: str, evicted: list[str]) -> None:
        self.name = name
        self._evicted = evicted

    def evict(self) -> None:
        self._evicted.append(self.name)


class Crowd:
    """Connections by name, and in which order they had to go."""

    def __init__(self, *limits: int) -> None:
        self.places = ConnectionPlaces(*limits)
        self.evicted: list[str] = []
        self._connections: dict[str, Connection] = {}

    def __getitem__(self, name: str) -> Connection:
        return self._connections.setdefault(name, Connection(name, self.evicted))

    def enter(self, names: str) -> list[bool]:
        return [self.places.enter(self[name]) for name in names]


def test_the_connection_that_owes_a_request_for_the_longest_time_goes_first():
    crowd = Crowd(3, 0, 0)
    assert crowd.enter("abcd") == [True] * 4
    crowd.places.expect(crowd["b"])  # its head begins, or its body makes progress
    assert crowd.enter("ef") == [True] * 2
    assert crowd.evicted == ["a", "c", "d"]


def test_a_connection_that_is_served_keeps_its_place_and_one_that_left_frees_it():
    crowd = Crowd(2, 0, 0)
    crowd.enter("ab")
    for name in "ab":
        crowd.places.serve(crowd[name])
    assert crowd.enter("c") == [False]
    crowd.places.leave(crowd["a"])
    assert crowd.enter("c") == [True]
    assert crowd.evicted == []


def test_when_all_are_served_a_newcomer_gets_a_reserved_place_until_another_is_free():
    crowd = Crowd(1, 2, 0)
    crowd.enter("a")
    crowd.places.serve(crowd["a"])
    assert crowd.enter("bcd") == [True] * 3
    assert crowd.evicted == ["b"], "of those on reserved places the oldest goes"
    assert crowd.places.is_reserved(crowd["c"])
    assert not crowd.places.promote(crowd["c"])
    crowd.places.leave(crowd["a"])
    assert crowd.places.promote(crowd["c"])
    assert not crowd.places.is_reserved(crowd["c"])


def test_only_so_many_connections_without_a_place_are_closed_softly():
    crowd = Crowd(3, 0, 2)
    crowd.enter("abc")
    assert [crowd.places.linger(crowd[name]) for name in "abc"] == [True, True, False]
    assert crowd.enter("def") == [True] * 3
    crowd.places.leave(crowd["a"])
    assert crowd.places.linger(crowd["d"])
    assert crowd.evicted == []


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


class Clients:
    """Raw connections to one server."""

    def __init__(self, port: int, stack: contextlib.ExitStack) -> None:
        self._port = port
        self._stack = stack

    def connect(self, start: bytes = b"") -> socket.socket:
        """A connection that had a request answered; the server has read `start` behind it."""
        one = self._stack.enter_context(socket.create_connection(("127.0.0.1", self._port), 60))
        one.sendall(LIVE + start)
        assert one.recv(65_536).startswith(b"HTTP/1.1 200 ")
        return one


def test_row_04_half_open_heads_cost_others_nothing(checkpoint):
    """1,300 of them from one client gave 28 % of all other requests a 503, health included."""
    with server_in_thread(checkpoint, max_connections=10) as port, contextlib.ExitStack() as stack:
        clients = Clients(port, stack)
        for _ in range(40):
            clients.connect(b"GET /v1/mo")
            assert only_answer(exchange(port, MODELS)).status == 200


def test_row_04_the_oldest_unfinished_head_is_answered_503_and_the_others_stay(checkpoint):
    with server_in_thread(checkpoint, max_connections=3) as port, contextlib.ExitStack() as stack:
        clients = Clients(port, stack)
        idle, oldest, newest = (
            clients.connect(start) for start in (b"", b"GET /a HT", b"GET /a HT")
        )
        assert only_answer(exchange(port, MODELS)).status == 200
        assert read_all(idle) == b"", "it owed a request for the longest time, and had sent none"
        clients.connect(b"PUT / HT")
        clients.connect(b"PUT / HT")
        (refused,) = answers_in(read_all(oldest))
        assert_error(refused, 503)
        assert refused.headers["retry-after"] == "1"
        newest.sendall(b"TP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert answers_in(read_all(newest))[0].status == 404


def test_row_04_a_body_that_stands_still_goes_before_one_that_comes(checkpoint):
    """Without an API key anyone may promise a body and send none of it."""
    head = b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
    with server_in_thread(checkpoint, max_connections=2) as port, contextlib.ExitStack() as stack:
        clients = Clients(port, stack)
        still = clients.connect(head % 300_000 + b"{")
        comes = clients.connect(head % 200_000 + b" " * 100_000)
        still.sendall(b"[")
        assert only_answer(exchange(port, MODELS)).status == 200
        (refused,) = answers_in(read_all(still))
        assert_error(refused, 503)
        comes.sendall(b" " * 100_000)
        assert_error(answers_in(comes.recv(65_536))[0], 400)


def test_row_04_health_is_answered_while_every_place_computes_an_answer(checkpoint):
    """All but health gets a 503 then, in at most so many places beside the others."""

    class SlowImages:
        async def load(self, images, deadline=None):
            await asyncio.Event().wait()

    @contextlib.asynccontextmanager
    async def slow_images():
        yield {"images": SlowImages()}

    body = (
        b'{"model":"meta/llama-3.2-11b-vision-instruct","messages":[{"role":"user","content":'
        b'[{"type":"image_url","image_url":{"url":"http://a.example/x"}}]}]}'
    )
    post = b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b"
    busy = post % (CHAT.encode(), len(body), body)
    settings = {"max_connections": 2, "parts": slow_images}
    with server_in_thread(checkpoint, **settings) as port, contextlib.ExitStack() as stack:
        clients = Clients(port, stack)
        for _ in range(2):
            clients.connect(busy)
        for _ in range(NUM_RESERVED_PLACES + 5):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), 60))
        (live,) = answers_in(exchange(port, LIVE))
        assert live.status == 200
        assert live.headers["connection"] == "close"
        refused = only_answer(exchange(port, MODELS))
        assert_error(refused, 503)
        assert refused.headers["retry-after"] == "1"
