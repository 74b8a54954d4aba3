"""What a request's head must look like, to the byte: HTTP/1.1 that has one reading only.

Owns the grammar of the request line, of header fields and of the body's framing (RFC 9112),
and their size limits. A head that two readers could read differently is rejected: a proxy in
front may have read it the other way. Knows nothing of sockets, of Sanic or of routes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import ApiError, BadRequestError

METHOD = re.compile(rb"[A-Z][A-Z0-9_-]{0,31}")
VERSION = re.compile(rb"HTTP/1\.[01]")
# A path and a query of visible ASCII. A fragment is never sent.
ORIGIN_FORM = re.compile(rb"/[!-\"$-~]*")
ABSOLUTE_FORM = re.compile(rb"(?i:https?)://(?P<authority>[^/?#@]+)(?P<path>/[!-\"$-~]*)?")
FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t -~\x80-\xff]*)")
# A name or a bracketed address, and a port in digits. Empty if the URL has no authority.
HOST = re.compile(rb"([A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(:[0-9]{0,5})?")
LENGTH = re.compile(rb"[0-9]{1,15}")
# What ends a line for some readers only.
LONE_LINE_END = re.compile(rb"\r(?!\n)|(?<!\r)\n|\x00")
# Fields of which this server reads one: of two, a proxy in front may have read the other.
SINGLE_FIELDS = frozenset(
    {b"authorization", b"x-api-key", b"content-type", b"content-encoding", b"x-request-id"}
    | {b"origin", b"expect", b"traceparent"}
)
FRAMING = (b"content-length", b"transfer-encoding")
_CODING = b"transfer-encoding:"
_CHUNKED = _CODING + b" chunked"


class HeadTooLargeError(ApiError):
    status = 431
    type = "invalid_request_error"


class UrlTooLongError(ApiError):
    status = 414
    type = "invalid_request_error"


@dataclass(frozen=True, slots=True)
class HeadLimits:
    """max_bytes: of the whole head; max_url_bytes: of the request's target in it.

    takes_repeated_key: the same Authorization twice is one.
    """

    max_bytes: int = 16_384
    max_headers: int = 100
    max_url_bytes: int = 8_192
    takes_repeated_key: bool = False


@dataclass(frozen=True, slots=True)
class RequestHead:
    """A parsed head. target: in origin form, or `*` for OPTIONS. is_chunked, content_length:
    where the body ends; without either there is no body."""

    method: bytes
    target: bytes
    version: bytes
    is_chunked: bool
    content_length: int | None


def end_of_head(received: bytes | bytearray, limits: HeadLimits, num_passed: int = 0) -> int | None:
    """The length of the head in bytes; None while its end has not arrived.

    num_passed: how many bytes an earlier call has checked; they are not checked again.
    Raises ApiError as soon as the bytes cannot become a valid head: the rest of something that
    is not HTTP may never come.
    """
    end = received.find(b"\r\n\r\n", max(0, num_passed - 3), limits.max_bytes)
    if end >= 0:
        return end + 4
    if len(received) >= limits.max_bytes:
        raise HeadTooLargeError(f"the request's head is over {limits.max_bytes:,} bytes")
    # The last checked byte may have been half of a line end.
    start = max(0, num_passed - 1)
    if has_lone_line_end(received, start):
        raise BadRequestError("the request's head has a line that does not end with CR LF")
    line_end = received.find(b"\r\n")
    if line_end >= start:
        _read_request_line(bytes(received[:line_end]), limits)
    return None


def read_head(head: bytes, limits: HeadLimits) -> RequestHead:
    """Parse a whole head, which includes its empty line.

    Raises ApiError: 400 for what has two readings, 414 or 431 for what is too large.
    """
    if has_lone_line_end(head):
        raise BadRequestError("the request's head has a line that does not end with CR LF")
    request_line, *lines = head[:-4].split(b"\r\n")
    method, target, version = _read_request_line(request_line, limits)
    fields = read_fields(lines, limits)
    _check_host(fields, version)
    _check_single(fields, limits)
    target = _origin_form(method, target, fields)
    length = _content_length(fields)
    return RequestHead(method, target, version, _is_chunked(fields, version), length)


def has_lone_line_end(received: bytes | bytearray, start: int = 0) -> bool:
    """Whether a line ends with CR or LF alone, or contains a NUL. A final CR may become CR LF."""
    end = len(received) - received.endswith(b"\r")
    return LONE_LINE_END.search(received, start, end) is not None


def read_fields(lines: list[bytes], limits: HeadLimits) -> list[tuple[bytes, bytes]]:
    """Lower-case names, and values without surrounding blanks. Raises ApiError."""
    if len(lines) > limits.max_headers:
        raise HeadTooLargeError(f"the request has over {limits.max_headers} headers")
    return [_read_field(line) for line in lines]


def canonical(head: bytes, read: RequestHead) -> bytes:
    """The head in the form that every parser reads alike: origin-form target, plain `chunked`."""
    request_line, *lines = head[:-4].split(b"\r\n")
    wanted = b" ".join((read.method, read.target, read.version))
    if request_line == wanted and not read.is_chunked:
        return head
    lines = [_CHUNKED if line.lower().startswith(_CODING) else line for line in lines]
    return b"\r\n".join([wanted, *lines, b"", b""])


def _read_request_line(line: bytes, limits: HeadLimits) -> tuple[bytes, bytes, bytes]:
    method, _, rest = line.partition(b" ")
    target, _, version = rest.partition(b" ")
    if len(target) > limits.max_url_bytes:
        raise UrlTooLongError(f"the request's URL is over {limits.max_url_bytes:,} bytes")
    if not METHOD.fullmatch(method):
        raise BadRequestError("the request does not start with an HTTP method")
    if not VERSION.fullmatch(version):
        raise BadRequestError("the request line must end with HTTP/1.1 (or HTTP/1.0)")
    return method, target, version


def _read_field(line: bytes) -> tuple[bytes, bytes]:
    match = FIELD.fullmatch(line)
    if match is None:
        raise BadRequestError(
            "a header is folded, has no name, has a blank before its colon or contains an"
            " invalid character"
        )
    return match[1].lower(), match[2].strip(b" \t")


def _check_host(fields: list[tuple[bytes, bytes]], version: bytes) -> None:
    hosts = [value for name, value in fields if name == b"host"]
    if len(hosts) > 1 or (not hosts and version != b"HTTP/1.0"):
        raise BadRequestError("the request must have one Host header")
    if hosts and not HOST.fullmatch(hosts[0]):
        raise BadRequestError("the Host header must be a host name and an optional port")


def _check_single(fields: list[tuple[bytes, bytes]], limits: HeadLimits) -> None:
    """Raises BadRequestError if a header that has one value comes twice."""
    single = [(name, value) for name, value in fields if name in SINGLE_FIELDS]
    if limits.takes_repeated_key:
        keys = {value for name, value in single if name == b"authorization"}
        single = [(name, value) for name, value in single if name != b"authorization"]
        single += [(b"authorization", key) for key in keys]
    names = [name for name, _ in single]
    if len(names) != len(set(names)):
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRequestError(f"the request has the header {twice.decode()} more than once")


def _origin_form(method: bytes, target: bytes, fields: list[tuple[bytes, bytes]]) -> bytes:
    """The target without scheme and host. The URL's host must equal the Host header."""
    if ORIGIN_FORM.fullmatch(target) or (method == b"OPTIONS" and target == b"*"):
        return target
    absolute = ABSOLUTE_FORM.fullmatch(target)
    if absolute is None:
        raise BadRequestError("the request's URL must be a path of visible ASCII characters")
    if dict(fields).get(b"host", b"").lower() != absolute["authority"].lower():
        raise BadRequestError("the host of the request's URL differs from its Host header")
    return absolute["path"] or b"/"


def _content_length(fields: list[tuple[bytes, bytes]]) -> int | None:
    """The declared length. Raises BadRequestError if the framing is declared twice."""
    framing = [(name, value) for name, value in fields if name in FRAMING]
    if len(framing) > 1:
        raise BadRequestError(
            "the request has Content-Length or Transfer-Encoding more than once, or both"
        )
    if not framing or framing[0][0] != b"content-length":
        return None
    if not LENGTH.fullmatch(framing[0][1]):
        raise BadRequestError("Content-Length must be digits")
    return int(framing[0][1])


def _is_chunked(fields: list[tuple[bytes, bytes]], version: bytes) -> bool:
    codings = [value for name, value in fields if name == b"transfer-encoding"]
    if not codings:
        return False
    if codings[0].lower() != b"chunked" or version == b"HTTP/1.0":
        raise BadRequestError("Transfer-Encoding must be chunked, and needs HTTP/1.1")
    return True
