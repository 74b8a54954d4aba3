"""Rows 1 to 5: what is refused by the way a request comes, before anyone reads what it asks.

Raw bytes against the real server, on every route that takes a body. The single shapes of
heads and chunks, and the pieces in which they come, are `test_http_head`'s.
"""

import gc
import gzip
import json
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
from support.http_side import MODEL, all_routes
from support.invariants import (
    CHAT,
    POSTED_HANDLERS,
    POSTED_ROUTES,
    SLACK,
    assert_error,
    body_for,
    peak_bytes,
)
from support.polling import wait_until
from support.raw_http import answers_in, exchange, only_answer
from support.request_heads import BROKEN_CHUNKS, TWO_READINGS
from support.threaded import server_in_thread

from vlmserve.server.http.protocol import LenientRequest

TLS_FILE = Path(__file__).resolve().parents[2] / "data" / "tls_test_only.pem"
LIVE = b"GET /v1/health/live HTTP/1.1\r\nHost: a\r\n\r\n"
CAP = 64 * 1024 * 1024
SLOW_S = 10.0
BODY = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "What?"}]}).encode()
# A dozen suffices for the second of two event loops, and for TLS.
SOME_READINGS = list(TWO_READINGS.values())[::5]


def test_row_01_every_route_that_takes_a_body_is_among_those_that_are_tested(checkpoint):
    posted = {path for method, path in all_routes(checkpoint) if method == "POST"}
    # A cancel has no body.
    assert posted - {"/v1/responses/x/cancel"} == set(POSTED_ROUTES)


def head_of(route: str, *lines: bytes, method: bytes = b"POST") -> bytes:
    request_line = method + b" " + route.encode() + b" HTTP/1.1"
    return b"\r\n".join([request_line, b"Host: a", *lines, b"", b""])


def smuggling(route: str) -> list[bytes]:
    """Requests that two servers could read differently, each with a second one behind it."""
    path = route.encode()
    heads = [head.replace(b" / ", b" " + path + b" ", 1) for head in TWO_READINGS.values()]
    chunked = head_of(route, b"Transfer-Encoding: chunked")
    return [head + LIVE for head in heads] + [
        chunked + one + LIVE for one in BROKEN_CHUNKS.values()
    ]


def test_row_01_what_two_servers_could_read_differently_is_refused_once(standing):
    for route in [*POSTED_HANDLERS, "/v1/models", "/nothing"]:
        for raw in smuggling(route):
            assert_error(only_answer(exchange(standing.server.port, raw)), 400)


def test_row_01_requests_in_one_piece_are_answered_in_turn_up_to_a_bad_one(standing):
    body = json.dumps(body_for(CHAT)).encode()
    good = head_of(CHAT, b"Content-Length: %d" % len(body)) + body
    coded = head_of(CHAT, b"Transfer-Encoding: chunked") + b"%x\r\n%b\r\n0\r\n\r\n" % (
        len(body),
        body,
    )
    bad = head_of(CHAT, b"Content-Length : 4") + LIVE
    *answers, last = answers_in(exchange(standing.server.port, good + coded + LIVE + bad))
    assert [answer.status for answer in answers] == [200, 200, 200]
    assert_error(last, 400)
    assert last.headers["connection"] == "close"


def test_row_01_the_last_line_end_of_a_careless_client_is_no_request(standing):
    raw = LIVE + b"\r\n" + LIVE.replace(b"Host: a", b"Host: a\r\nConnection: close")
    answers = answers_in(exchange(standing.server.port, raw))
    assert [answer.status for answer in answers] == [200, 200]


def test_row_01_a_client_that_knows_other_protocols_is_answered_in_this_one(standing):
    """An upgrade is an offer; curl and Java make it to every server."""
    for offer in (b"h2c", b"websocket"):
        head = head_of(
            "/v1/health/live", b"Connection: Upgrade", b"Upgrade: " + offer, method=b"GET"
        )
        assert only_answer(exchange(standing.server.port, head)).status == 200


def test_a_stream_to_http_1_0_has_no_chunks_and_ends_with_its_connection(standing):
    """Such a client, an old proxy among them, used to read the sizes of chunks as text."""
    body = json.dumps(body_for(CHAT, stream=True)).encode()
    lines = (b"Connection: keep-alive", b"Content-Length: %d" % len(body))
    raw = head_of(CHAT, *lines).replace(b"HTTP/1.1", b"HTTP/1.0") + body
    head, _, streamed = exchange(standing.server.port, raw).partition(b"\r\n\r\n")
    assert b"\r\nconnection: close" in head
    assert b"transfer-encoding" not in head.lower()
    frames = streamed.split(b"\n\n")
    assert frames[-2:] == [b"data: [DONE]", b""]
    assert all(one.startswith(b"data: ") for one in frames[:-1])


def test_row_01_a_refused_head_request_gets_no_body_and_options_a_json_error(standing):
    answer = only_answer(exchange(standing.server.port, b"HEAD / HTTP/1.1\r\nX : a\r\n\r\n"))
    assert (answer.status, answer.body) == (400, b"")
    for path in ("/nothing", CHAT, "*"):
        raw = head_of(path, b"Connection: close", method=b"OPTIONS")
        assert_error(only_answer(exchange(standing.server.port, raw)), 404, 405)


def test_row_01_a_client_that_waits_for_leave_gets_it_once_and_after_the_head_was_judged(standing):
    body = json.dumps(body_for(CHAT)).encode()
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    asks, closes = b"Expect: 100-continue", b"Connection: close"
    framings = [(b"Content-Length: %d" % len(body), body), (b"Transfer-Encoding: chunked", chunked)]
    for framing, sent in framings:
        received = exchange(standing.server.port, head_of(CHAT, asks, closes, framing), sent)
        leave, answer = answers_in(received)
        assert (leave.status, answer.status) == (100, 200)
    for refused in (b"Content-Encoding: gzip", b"Content-Length : 4"):
        raw = head_of(CHAT, asks, b"Content-Length: 9", refused)
        assert_error(only_answer(exchange(standing.server.port, raw)), 400, 415)
    raw = head_of(CHAT, b"Expect: 200-ok", b"Content-Length: 9")
    assert_error(only_answer(exchange(standing.server.port, raw)), 417)


@pytest.mark.parametrize("is_secure", [False, True])
def test_row_01_heads_are_judged_alike_under_tls_and_on_either_event_loop(checkpoint, is_secure):
    """The shared server runs on uvloop without TLS."""
    own, theirs = (server_tls(), client_tls()) if is_secure else (None, None)
    with server_in_thread(checkpoint, tls=own) as port:
        for head in SOME_READINGS:
            assert_error(only_answer(exchange(port, head + LIVE, tls=theirs)), 400)
        chunked = head_of(CHAT, b"Transfer-Encoding: chunked")
        assert_error(only_answer(exchange(port, chunked + b"0x3\r\nabc\r\n", tls=theirs)), 400)
        whole = chunked + b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
        closing = LIVE.replace(b"Host: a", b"Host: a\r\nConnection: close")
        answers = answers_in(exchange(port, whole, closing, tls=theirs))
        assert [answer.status for answer in answers] == [200, 200]


def server_tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS_FILE)
    return context


def client_tls() -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=TLS_FILE)
    context.check_hostname = False
    return context


def test_row_02_a_head_over_16_kb_or_100_headers_is_a_431(standing):
    for route in POSTED_HANDLERS:
        for lines in ([b"X-A: " + b"a" * 16_384], [b"X-A: a"] * 100):
            raw = head_of(route, *lines, b"Content-Length: 0")
            assert_error(only_answer(exchange(standing.server.port, raw)), 431)
        long_url = b"POST " + route.encode() + b"?" + b"a" * 8_192 + b" HTTP/1.1\r\nHost: a\r\n\r\n"
        assert_error(only_answer(exchange(standing.server.port, long_url)), 414)


def test_row_02_an_endless_head_is_a_431_before_its_end(standing):
    endless = b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 200_000
    assert_error(only_answer(exchange(standing.server.port, endless)), 431)


def test_row_02_the_limits_are_settings(checkpoint):
    with server_in_thread(checkpoint, max_head_bytes=300, max_headers=3) as port:
        closing = b"Connection: close"
        fits = head_of("/v1/models", closing, b"X: a", method=b"GET")
        assert only_answer(exchange(port, fits)).status == 200
        for lines in ([b"X: a"] * 2, [b"X: " + b"a" * 300]):
            raw = head_of("/v1/models", closing, *lines, method=b"GET")
            assert_error(only_answer(exchange(port, raw)), 431)


def test_row_03_a_body_over_its_cap_is_a_413_before_it_has_come(standing):
    """Not a byte of the data is sent, and nobody is asked to go on and send it."""
    declared = b"Content-Length: %d" % (CAP + 1)
    for route in POSTED_HANDLERS:
        for raw in (
            head_of(route, declared),
            head_of(route, declared, b"Expect: 100-continue"),
            head_of(route, b"Transfer-Encoding: chunked") + b"%x\r\n" % (CAP + 1),
        ):
            assert_error(only_answer(exchange(standing.server.port, raw)), 413)


def test_row_03_a_body_that_comes_all_the_same_is_not_kept(standing):
    """The client reads its 413 even if it sends on: the server listens, and forgets."""
    (worker,) = standing.pids("worker")
    before = peak_bytes(worker)
    raw = head_of(CHAT, b"Content-Length: %d" % (CAP + 1))
    assert_error(only_answer(exchange(standing.server.port, raw, b"x" * CAP)), 413)
    assert peak_bytes(worker) - before < CAP / 4


@pytest.mark.parametrize("size", [100, 8_000])
def test_row_03_chunks_are_counted_together(checkpoint, size):
    chunk = b"%x\r\n%b\r\n" % (size, b"x" * size)
    with server_in_thread(checkpoint, max_body_bytes=16_000) as port:
        for route in POSTED_HANDLERS:
            head = head_of(route, b"Transfer-Encoding: chunked")
            assert_error(only_answer(exchange(port, head + chunk * (16_000 // size + 1))), 413)
            within = head + chunk * (16_000 // size) + b"0\r\n\r\n"
            closing = LIVE.replace(b"Host: a", b"Host: a\r\nConnection: close")
            first, second = answers_in(exchange(port, within + closing))
            assert (first.status, second.status) == (400, 200), "read to its end, and no JSON"


def trickle(port: int, start: bytes, rest: bytes, pause_s: float) -> bytes:
    return exchange(port, start, *(bytes([byte]) for byte in rest), pause_s=pause_s)


def slow_requests() -> list[tuple[bytes, bytes]]:
    """What comes at once and what in drops, on each route: in the head, and in the body."""
    found = []
    for route in POSTED_HANDLERS:
        head = head_of(route, b"Content-Length: 999")
        chunked = head_of(route, b"Transfer-Encoding: chunked")
        found += [(head[:20], head[20:40] * 9), (head, b"{" * 99), (chunked, b"1\r\n{\r\n" * 20)]
    return found


def test_row_04_a_slow_head_or_body_is_a_408_in_10_s_and_holds_up_nobody(standing):
    """A byte now and then is as slow as none: it began the time anew before."""
    asked = slow_requests()
    with ThreadPoolExecutor(len(asked)) as pool:
        began = time.monotonic()
        slow = [
            pool.submit(trickle, standing.server.port, *request, SLOW_S / 15) for request in asked
        ]
        while not all(one.done() for one in slow):
            standing.probe()
            wait(slow, timeout=0.5)
        seconds = time.monotonic() - began
    for one in slow:
        assert_error(only_answer(one.result()), 408)
    assert SLOW_S * 0.9 < seconds < SLOW_S * SLACK


def test_row_04_a_large_body_is_not_a_slow_one(checkpoint):
    """It may take as long as its bytes allow, beyond the time for a small one."""
    body = BODY[:-1] + b',"user":"' + b"a" * 65_536 * 5 + b'"}'
    pieces = [body[begin : begin + 65_536] for begin in range(0, len(body), 65_536)]
    head = head_of(CHAT, b"Connection: close", b"Content-Length: %d" % len(body))
    with server_in_thread(checkpoint, request_timeout_s=0.4) as port:
        answer = only_answer(exchange(port, head, *pieces, pause_s=0.1))
    assert answer.status == 200


def test_an_idle_connection_keeps_nothing_of_its_last_request(checkpoint):
    """Each of 1,000 kept a body of up to 64 MiB for as long as it was kept itself."""
    body = BODY[:-1] + b',"user":"' + b"a" * 1_000_000 + b'"}'
    head = head_of(CHAT, b"Content-Length: %d" % len(body))
    with (
        server_in_thread(checkpoint) as port,
        socket.create_connection(("127.0.0.1", port), 30) as client,
    ):
        client.sendall(head + body)
        assert client.recv(65_536).startswith(b"HTTP/1.1 200 ")
        assert wait_until(lambda: not bodies_alive()), "the request is over"


def bodies_alive() -> list[LenientRequest]:
    return [
        one
        for one in gc.get_objects()
        if issubclass(type(one), LenientRequest) and len(one.body) > 500_000
    ]


def test_row_05_a_compressed_body_is_a_415(standing):
    bomb = gzip.compress(b"\0" * 10_000_000)
    for route in POSTED_HANDLERS:
        for coding in ("gzip", "deflate", "br", "zstd", "GZIP", "identity, gzip", "x-gzip"):
            answer = standing.post(route, bomb, **{"Content-Encoding": coding})
            assert_error(answer, 415)
            assert answer.headers["connection"] == "close"
