"""What is fuzzed: each target takes any bytes, and raises where the server would break a promise.

A refusal by the module's own error is no finding; any other exception is, and so is an accepted
input that another reader understands otherwise. Owns the targets, their seeds and the words that
their inputs are made of. Knows nothing of who mutates.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools
import msgspec
from support.invariants import BODY_ROUTES, CHAT, COMPLETIONS, STACK_ROUTES, body_for
from support.outside import FORBIDDEN
from support.pictures import HEADERS
from support.request_heads import (
    BROKEN_CHUNKS,
    GET,
    HOST,
    LIMITS,
    POST,
    TWO_READINGS,
)
from support.tool_call_answers import (
    NAMES,
    TAG,
    hostile,
    in_pieces,
    joined,
    parsed,
)
from support.wire_messages import FROM_ENGINE, TO_ENGINE

from vlmserve.router.errors import FrameTooLargeError, MalformedFrameError
from vlmserve.router.processes import wire
from vlmserve.server.api.sse import frame
from vlmserve.server.errors import ApiError, BadRequestError
from vlmserve.server.http.chunked import ChunkReader
from vlmserve.server.http.head import RequestHead, canonical, end_of_head, read_head
from vlmserve.server.images.addresses import is_allowed, parse_literal
from vlmserve.server.images.header import check_header, read_header
from vlmserve.server.images.settings import ImageError, ImageSettings
from vlmserve.server.images.sources import RemoteImage, parse_remote_url, parse_source
from vlmserve.server.schemas.decoding import decode_body
from vlmserve.server.schemas.json_text import check_now
from vlmserve.server.schemas.llama_stack.requests import (
    StackChatRequest,
    stack_generation,
    stack_model,
)
from vlmserve.server.schemas.openai.chat import ChatCompletionRequest, chat_generation
from vlmserve.server.schemas.openai.completions import CompletionRequest, completion_generation
from vlmserve.server.schemas.openai.tokenization import (
    DetokenizeRequest,
    TokenizeRequest,
    messages_of,
    offered_tools,
    prompt_of,
)
from vlmserve.server.structured_output import grammar_text as grammars

SETTINGS = ImageSettings()
MAX_BODY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Target:
    """check raises on a finding. words: what a mutation may put in."""

    check: Callable[[bytes], None]
    seeds: Sequence[bytes]
    words: Sequence[bytes] = field(default_factory=tuple)


class OtherReader:
    """What httptools reads in a request: an independent reader of the same bytes."""

    def __init__(self, data: bytes) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.num_messages = 0
        self.is_readable = True
        self.parser = httptools.HttpRequestParser(self)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass
        except httptools.HttpParserError:
            self.is_readable = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value.strip(b" \t")))

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.num_messages += 1


def _head_of(data: bytes) -> tuple[bytes, RequestHead] | None:
    """The head in the bytes, None where it is refused or its end is missing."""
    try:
        end = end_of_head(data, LIMITS)
        return None if end is None else (data[:end], read_head(data[:end], LIMITS))
    except ApiError:
        return None


def check_head(data: bytes) -> None:
    """A head means the same however it arrives, in its canonical form, and to another reader."""
    whole = _head_of(data)
    if whole is None:
        return
    head, read = whole
    num_passed = 0
    for length in range(0, len(head), 1 + len(head) // 16):
        assert end_of_head(head[:length], LIMITS) is None, "a part of a good head is refused"
        assert end_of_head(head[:length], LIMITS, num_passed) is None
        num_passed = length
    assert end_of_head(data, LIMITS, num_passed) == len(head)
    rewritten = canonical(head, read)
    assert read_head(rewritten, LIMITS) == read
    other = OtherReader(rewritten)
    if not other.is_readable:
        return
    assert (other.url, other.parser.get_method()) == (read.target, read.method)
    lengths = [int(value) for name, value in other.headers if name == b"content-length"]
    assert lengths == ([] if read.content_length is None else [read.content_length])
    codings = [value for name, value in other.headers if name == b"transfer-encoding"]
    assert codings == ([b"chunked"] if read.is_chunked else [])


def _chunks_of(data: bytes, step: int) -> tuple[bytes, bytes] | None:
    """The body and what is left behind it; None where it is refused or not complete."""
    reader, buffer, body = ChunkReader(LIMITS), bytearray(), b""
    try:
        for begin in range(0, len(data), step):
            buffer += data[begin : begin + step]
            while piece := reader.take(buffer, MAX_BODY_BYTES):
                body += piece
    except ApiError:
        return None
    return (body, bytes(buffer)) if reader.is_complete else None


def check_chunks(data: bytes) -> None:
    """A chunked body is the same in one piece and byte by byte, and to another reader."""
    whole = _chunks_of(data, len(data) or 1)
    assert whole == _chunks_of(data, 1 + len(data) // 256)
    if whole is None:
        return
    body, rest = whole
    other = OtherReader(
        POST + b"Transfer-Encoding: chunked\r\n\r\n" + data[: len(data) - len(rest)]
    )
    if other.is_readable:
        assert (other.body, other.num_messages) == (body, 1)


def check_image_header(data: bytes) -> None:
    """Any bytes have a header or are refused."""
    with contextlib.suppress(ImageError):
        check_header(read_header(data), SETTINGS)


def check_url(data: bytes) -> None:
    """A URL that is taken names one plain host, the same to another reader."""
    try:
        source = parse_source(data.decode("utf-8", "surrogatepass"), SETTINGS)
    except (ImageError, UnicodeDecodeError):
        return
    if not isinstance(source, RemoteImage):
        assert len(source.data) <= SETTINGS.max_image_bytes
        return
    assert source.url.isascii()
    assert source.url.isprintable()
    assert parse_remote_url(source.url, 1 << 20) == source
    parts = urlsplit(source.url)
    assert (parts.scheme, parts.hostname) == (source.scheme, source.host)
    assert (parts.username, parts.password, parts.fragment) == (None, None, "")
    assert (parts.port or source.port) == source.port
    check_address(source.host.encode())


def check_address(data: bytes) -> None:
    """What the C library reads as an address is never taken for a name, nor as another address."""
    try:
        host = data.decode("ascii")
        literal = parse_literal(host)
    except (UnicodeDecodeError, ValueError):
        return
    if literal is not None and is_allowed(literal, allow_private=False):
        assert literal.is_global
        assert not literal.is_multicast
    if not host or any(letter.isspace() or letter == "\0" for letter in host):
        return
    with contextlib.suppress(OSError):
        packed = socket.inet_aton(host)
        assert literal is not None, "the C library reads a name as an address"
        assert literal.packed == packed


def _tokenize(body: TokenizeRequest) -> object:
    return (prompt_of(body), messages_of(body), offered_tools(body))


def _stack(body: StackChatRequest) -> object:
    return stack_model(body), stack_generation(body)


def _schema(schema: type[msgspec.Struct], use: Callable[[Any], object]) -> Callable[[bytes], None]:
    def check(data: bytes) -> None:
        """A body is refused or understood, with and without fields that are not known."""
        with contextlib.suppress(BadRequestError):
            check_now(data)
            with contextlib.suppress(BadRequestError):
                use(decode_body(data, schema))
            use(decode_body(data, schema, unknown="ignore"))

    return check


def check_json(data: bytes) -> None:
    """Names that stand twice are found where Python's own reader finds them."""
    has_double = False

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal has_double
        has_double |= len(dict(pairs)) < len(pairs)
        return dict(pairs)

    try:
        msgspec.json.decode(data)
        text = json.dumps(json.loads(data, object_pairs_hook=keep), ensure_ascii=False)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError):
        with contextlib.suppress(BadRequestError):
            check_now(data)
        return
    is_bad = has_double or "\\u0000" in text.replace("\\\\", "")
    try:
        check_now(data)
    except BadRequestError:
        assert is_bad
    else:
        assert not is_bad


def check_frame(data: bytes) -> None:
    """A server-sent event is one line of data, whatever its text holds."""
    text = data.decode("utf-8", "replace")
    sent = frame({"a": text, text: [text]})
    assert sent.startswith(b"data: ")
    assert sent.endswith(b"\n\n")
    inside = sent.removeprefix(b"data: ").removesuffix(b"\n\n")
    assert b"\n" not in inside
    assert b"\r" not in inside
    assert json.loads(inside)["a"] == (text if text != "a" else [text])


class _NoLoop:
    """A stream reader asks for a loop although it never waits here."""

    def get_debug(self) -> bool:
        return False


_NO_LOOP: Any = _NoLoop()


def check_wire(data: bytes) -> None:
    """A frame is a message or a wire error, on either side; and what is a message stays one."""

    async def read(decoder: Any) -> None:
        reader = asyncio.StreamReader(loop=_NO_LOOP)
        reader.feed_data(data)
        reader.feed_eof()
        with contextlib.suppress(MalformedFrameError, FrameTooLargeError):
            while (message := await wire.read_message(reader, decoder, 1 << 16)) is not None:
                encoded = wire.encode_frame(message)[wire.HEADER_BYTES :]
                assert wire.encode_frame(decoder.decode(encoded))[wire.HEADER_BYTES :] == encoded

    for decoder in (wire.to_engine_decoder, wire.from_engine_decoder):
        _run(read(decoder))


def _run(coroutine: Any) -> None:
    """Without an event loop, which nothing here waits for: thousands a second."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    coroutine.close()
    raise AssertionError("it waits for more than there is")


def check_grammar(data: bytes) -> None:
    """Any text becomes a grammar to be compiled elsewhere, or is refused."""
    text = data.decode("utf-8", "replace")
    for make in (grammars.regex_grammar, grammars.lark_grammar, grammars.ebnf_grammar):
        with contextlib.suppress(BadRequestError):
            assert isinstance(json.loads(make(text)), dict)
    with contextlib.suppress(BadRequestError):
        grammars.choice_grammar(text.split("\n"))
    try:
        schema = msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return
    with contextlib.suppress(BadRequestError):
        grammars.json_schema_grammar(schema)


def check_tools(data: bytes) -> None:
    """An answer's calls and text are the same however it is cut, and nothing raises."""
    text = data.decode("utf-8", "replace")
    pieces = in_pieces(text)
    whole = joined(parsed(pieces))
    letters = [letter for piece in pieces for letter in ([piece] if piece == TAG else piece)]
    assert joined(parsed(letters)) == whole


def _bodies(routes: Sequence[str]) -> list[bytes]:
    return [json.dumps(body_for(route)).encode() for route in routes]


CHAT_BODIES = [
    *_bodies([CHAT]),
    json.dumps(
        body_for(CHAT, images=["data:image/png;base64,AA=="])
        | {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            "tool_choice": "auto", "response_format": {"type": "json_object"}, "stop": ["a"],
            "logit_bias": {"1": 2}, "stream_options": {"include_usage": True}, "stream": True,
        }
    ).encode(),
]  # fmt: skip
STACK_BODIES = [
    *_bodies(STACK_ROUTES[:1]),
    json.dumps(
        body_for(STACK_ROUTES[0], images=["http://a/"])
        | {
            "tools": [{"tool_name": "f", "parameters": {}}], "tool_choice": "auto",
            "tool_prompt_format": "json", "logprobs": {"top_k": 1},
            "sampling_params": {"strategy": {"type": "top_p", "temperature": 1, "top_p": 1}},
        }
    ).encode(),
]  # fmt: skip
JSON_WORDS = [
    *(b"{", b"}", b"[", b"]", b'"', b":", b",", b"null", b"true", b"1", b"-1", b"1e999", b"NaN"),
    *(rb"\u0000", rb"\ud800", rb"\"", rb"\\", b"9" * 30, b'"a":', b"{}", b"[]", b"\xff"),
]
HTTP_WORDS = [
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"0x", b"chunked", b"Content-Length: 4\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", HOST, b"HTTP/1.0", b"http://a", b"*", b"\r\n\r\n"),
]
URL_WORDS = [
    *(b"http://", b"https://", b"@", b"\\", b"/", b"?", b"#", b":", b"[", b"]", b"%00", b"%2e"),
    *(b"127.0.0.1", b"0x7f", b"0177", b"::1", b"::ffff:", b".", b"xn--", b"data:image/png;base64,"),
    *("。".encode(), "．".encode(), "①".encode(), "ⅰ".encode(), b"localhost", b"1", b"0", b"%25"),
]
TOOL_WORDS = [
    *(name.encode() for name in NAMES),
    *(TAG.encode(), b"<function=", b"</function>", b'{"name": "f"', b'"parameters": {', b"}"),
    *(b"[", b"]", b"(", b")", b"=", b",", b";", b"'", b'"', b"\\", b"f(", b"True", b"None", b"1e9"),
    *(b".call", b"\n", b" "),
]

TARGETS = {
    "head": Target(check_head, [*TWO_READINGS.values(), GET + HOST + b"\r\n"], HTTP_WORDS),
    "chunks": Target(
        check_chunks, [*BROKEN_CHUNKS.values(), b"3;a=b\r\nabc\r\n0\r\nX: a\r\n\r\nGET"], HTTP_WORDS
    ),
    "image_header": Target(
        check_image_header,
        [data[:400] for data, _ in HEADERS],
        [b"\xff\xd8\xff", b"IHDR", b"RIFF", b"WEBP", b"VP8X", b"VP8L", b"VP8 ", b"GIF89a", b"\xff"],
    ),
    "url": Target(
        check_url,
        [b"http://a.example:8080/b?c=d#e", b"https://[2606:4700::1111]/", b"data:;base64,QUJD"]
        + [f"http://{'[' + one + ']' if ':' in one else one}/".encode() for one in FORBIDDEN],
        URL_WORDS,
    ),
    "address": Target(check_address, [one.encode() for one in FORBIDDEN], URL_WORDS),
    "chat": Target(_schema(ChatCompletionRequest, chat_generation), CHAT_BODIES, JSON_WORDS),
    "completions": Target(
        _schema(CompletionRequest, completion_generation), _bodies([COMPLETIONS]), JSON_WORDS
    ),
    "llama_stack": Target(_schema(StackChatRequest, _stack), STACK_BODIES, JSON_WORDS),
    "tokenize": Target(
        _schema(TokenizeRequest, _tokenize), _bodies(BODY_ROUTES[-4:-3]), JSON_WORDS
    ),
    "detokenize": Target(_schema(DetokenizeRequest, str), _bodies(BODY_ROUTES[-1:]), JSON_WORDS),
    "json": Target(check_json, [*CHAT_BODIES, b'{"a":1,"\\u0061":2}'], JSON_WORDS),
    "sse": Target(check_frame, [b"a\r\nb\n\ndata: x", "\u2028\u0085é".encode()], [b"\n", b"data:"]),
    "wire": Target(
        check_wire,
        [wire.encode_frame(one) for one in (*TO_ENGINE, *FROM_ENGINE)],
        [b"\xdf", b"\x91"],
    ),
    "grammar": Target(
        check_grammar,
        [b"[a-z]+(b|c)?", b'start: "a" | /b/', b'root ::= "a" b', b'{"type":"object"}'],
        [b"start:", b"root ::=", b'"', b"/", b"\\", b"(", b"[", b"<|eot_id|>", b"%", b"//", b"\n"],
    ),
    "tools": Target(check_tools, [text.encode() for _, text in hostile(60)], TOOL_WORDS),
}
