"""The strict reader of heads and chunks: what it takes, what it refuses, and how early."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.request_heads import BROKEN_CHUNKS, GET, HOST, LIMITS, POST, TWO_READINGS

from vlmserve.server.errors import ApiError, BadRequestError
from vlmserve.server.http.chunked import FREE_FRAMING_BYTES, ChunkReader
from vlmserve.server.http.head import (
    HeadLimits,
    HeadTooLargeError,
    UrlTooLongError,
    canonical,
    end_of_head,
    read_head,
)


def read(head: bytes, step: int | None = None):
    """A head that comes in pieces of `step` bytes, refused while it comes or when it is whole."""
    num_passed = 0
    for length in range(step or len(head), len(head) + (step or 1), step or 1):
        end = end_of_head(head[:length], LIMITS, num_passed)
        if end is not None:
            return read_head(head[:end], LIMITS)
        num_passed = min(length, len(head))
    raise AssertionError("the head has no end")


@pytest.mark.parametrize("head", TWO_READINGS.values(), ids=TWO_READINGS)
def test_row_01_a_head_that_could_be_read_in_two_ways_is_refused(head):
    for step in (None, 1, 2, 7):
        with pytest.raises(BadRequestError):
            read(head, step)


def test_a_good_head_is_read_as_it_says():
    head = read(POST + b"Content-Length: 044\r\nX: \xe9\t,\r\nY:\r\n\r\n")
    assert (head.method, head.target, head.version) == (b"POST", b"/", b"HTTP/1.1")
    assert (head.content_length, head.is_chunked) == (44, False)
    assert read(GET + HOST + b"\r\n").content_length is None
    assert read(b"GET / HTTP/1.0\r\n\r\n").version == b"HTTP/1.0"
    assert read(b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n").target == b"*"
    for host in (b"a.example:8000", b"[::1]:8000", b"127.0.0.1", b""):
        read(GET + b"Host: " + host + b"\r\n\r\n")


def test_the_same_key_twice_is_one_key_where_that_is_set():
    """sglang-router sends its key beside the client's equal one."""
    limits = HeadLimits(takes_repeated_key=True)
    key, other = b"Authorization: Bearer a\r\n", b"Authorization: Bearer b\r\n"
    assert read_head(GET + HOST + key + key + b"\r\n", limits)
    for head, taken in (
        (key + key, HeadLimits()),
        (key + other, limits),
        (2 * b"Content-Type: a\r\n", limits),
    ):
        with pytest.raises(BadRequestError, match="more than once"):
            read_head(GET + HOST + head + b"\r\n", taken)


@pytest.mark.parametrize(
    ("line", "path"),
    [
        (b"GET http://A.example:8000/b?c=d HTTP/1.1", b"/b?c=d"),
        (b"GET HTTP://a.example:8000 HTTP/1.1", b"/"),
    ],
)
def test_a_url_with_the_host_of_the_host_header_becomes_its_path(line, path):
    head = line + b"\r\nHost: a.example:8000\r\nX: y\r\n\r\n"
    rewritten = canonical(head, read(head))
    assert rewritten == b"GET " + path + b" HTTP/1.1\r\nHost: a.example:8000\r\nX: y\r\n\r\n"


def test_the_coding_is_passed_on_in_the_one_spelling_that_every_parser_knows():
    head = POST + b"X: Chunked\r\nTRANSFER-Encoding: \t Chunked \t\r\n\r\n"
    assert read(head).is_chunked
    rewritten = canonical(head, read(head))
    assert rewritten == POST + b"X: Chunked\r\ntransfer-encoding: chunked\r\n\r\n"


def test_sizes_are_limited_and_the_limits_themselves_are_allowed():
    limits = HeadLimits(max_bytes=200, max_headers=3, max_url_bytes=20)
    head = GET + HOST + b"A: a\r\nB: b\r\n"
    assert read_head(head + b"\r\n", limits)
    with pytest.raises(HeadTooLargeError):
        read_head(head + b"C: c\r\n\r\n", limits)
    assert read_head(b"GET /" + b"a" * 19 + b" HTTP/1.1\r\n" + HOST + b"\r\n", limits)
    long_line = b"GET /" + b"a" * 20 + b" HTTP/1.1\r\n"
    with pytest.raises(UrlTooLongError):
        end_of_head(long_line, limits)
    with pytest.raises(UrlTooLongError):
        read_head(long_line + HOST + b"\r\n", limits)
    full = GET + HOST + b"A: " + b"a" * (200 - 32) + b"\r\n\r\n"
    assert len(full) == 200
    assert end_of_head(full, limits) == 200
    with pytest.raises(HeadTooLargeError):
        end_of_head(full[:-4] + b"a\r\n\r\n", limits)


@pytest.mark.parametrize("start", [b"GET /\r\n", b"GET / HTTP/1.1\n", GET + b"Host: a\n", b"\0"])
def test_what_cannot_become_a_head_is_refused_before_its_end(start):
    with pytest.raises(BadRequestError):
        end_of_head(start, LIMITS)


def test_a_head_is_waited_for_whatever_byte_it_stops_at():
    head = POST + b"Content-Length: 4\r\n\r\n"
    for length in range(len(head)):
        assert end_of_head(head[:length], LIMITS) is None
    assert end_of_head(head + b"abcd", LIMITS) == len(head)


def test_reading_a_hostile_head_takes_time_linear_in_its_length():
    """A pattern with two places for the same blank took a second for 16 kB of them."""
    blanks = GET + HOST + b"X:" + b" " * 16_000 + b"\x01"
    assert end_of_head(blanks, LIMITS) is None
    with pytest.raises(BadRequestError):
        read_head(blanks + b"\r\n\r\n", LIMITS)


def take_all(coded: bytes, cuts=(), limits=LIMITS, max_bytes=1 << 30):
    """The data of a coded body that arrives in pieces, the reader, and what is left over."""
    reader, buffer, data = ChunkReader(limits), bytearray(), b""
    bounds = [0, *cuts, len(coded)]
    for begin, end in itertools.pairwise(bounds):
        buffer += coded[begin:end]
        while piece := reader.take(buffer, max_bytes):
            data += piece
        if reader.declared_bytes > max_bytes:
            break
    return data, reader, bytes(buffer)


@pytest.mark.parametrize("coded", BROKEN_CHUNKS.values(), ids=BROKEN_CHUNKS)
def test_row_01_broken_chunks_are_refused_in_one_piece_and_byte_by_byte(coded):
    for cuts in ([], range(1, len(coded))):
        with pytest.raises(ApiError) as refusal:
            take_all(coded, cuts)
        assert refusal.value.status in (400, 431)


def coded_body(pieces, trailer=b""):
    chunks = b"".join(b"%X;ext=1\r\n%b\r\n" % (len(piece), piece) for piece in pieces if piece)
    return chunks + b"000\r\n" + trailer + b"\r\n"


@given(st.lists(st.binary(max_size=40), max_size=6), st.data())
def test_a_body_is_the_same_wherever_its_pieces_are_cut(pieces, data):
    coded = coded_body(pieces, data.draw(st.sampled_from([b"", b"X: a\r\n", b"X: a\r\nY:b\r\n"])))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(coded)), max_size=12)))
    found, reader, rest = take_all(coded + b"GET /", cuts)
    assert found == b"".join(pieces)
    assert reader.is_complete
    assert reader.num_bytes == reader.declared_bytes == len(found)
    assert rest == b"GET /", "what follows is not the body's"


def test_a_body_over_its_limit_is_known_before_it_has_come():
    data, reader, _ = take_all(b"3\r\nabc\r\nfffffffff\r\nabc", max_bytes=10)
    assert data == b"abc"
    assert reader.declared_bytes > 10


def test_a_trailer_has_the_limits_of_a_head():
    limits = HeadLimits(max_bytes=100, max_headers=2)
    assert take_all(b"0\r\nA: a\r\nB: b\r\n\r\n", limits=limits)[1].is_complete
    for trailer in (b"A: a\r\n" * 3 + b"\r\n", b"A: " + b"a" * 100):
        with pytest.raises(HeadTooLargeError):
            take_all(b"0\r\n" + trailer, limits=limits)


def test_chunks_of_a_byte_are_taken_for_a_small_body_only():
    """64 MB in chunks of a byte would be a minute's work, and 384 MB on the wire."""
    assert take_all(b"1\r\na\r\n" * 10_000 + b"0\r\n\r\n")[1].is_complete
    tiny = bytearray(b"1\r\na\r\n" * (FREE_FRAMING_BYTES // 3))
    with pytest.raises(BadRequestError, match="too small"):
        ChunkReader(LIMITS).take(tiny, 1 << 30)
