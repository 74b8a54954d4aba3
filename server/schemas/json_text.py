"""Checks a JSON text before it is decoded: no duplicate name, no U+0000, a bounded size.

Owns what decoders accept silently, or what makes them slow. The decoder rejects text that is not
JSON. Knows no schema.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from ..errors import BadRequestError

# Larger texts are checked in a thread.
INLINE_BYTES = 64 * 1024
SLICE_BYTES = 1024 * 1024
# Bounds of any text: decoding this many numbers, or strings and objects, takes some tens of
# milliseconds, in which no other thread runs. Only images and texts make a valid body large.
MAX_COMMAS = 1_000_000
MAX_MARKS = 200_000

_MARK = re.compile(rb'["{}\[\]]')
_COLON = re.compile(rb"[ \t\r\n]*:")
# Inside a string: runs of characters and escapes except that of U+0000. Bounded, because no
# other thread runs while a pattern is matched.
_RUN = re.compile(rb'(?:[^"\\]++|\\(?!u0000)[\s\S]){0,50000}+')


def check_now(text: bytes) -> None:
    """Check a text in time linear in its length.

    Raises BadRequestError for a duplicate name, U+0000, or too many values.
    """
    _check_commas(text)
    _check_names(text)


def _check_commas(text: bytes) -> None:
    """Bound the number of values by the number of commas, including commas in strings."""
    num_commas = 0
    for start in range(0, len(text), SLICE_BYTES):
        num_commas += text.count(b",", start, start + SLICE_BYTES)
        if num_commas > MAX_COMMAS:
            raise BadRequestError(f"the body has over {MAX_COMMAS:,} commas: send less")


def _check_names(text: bytes) -> None:
    """Go from one string or bracket to the next, without reading values."""
    objects: list[set[bytes] | None] = []
    num_marks = place = 0
    while (mark := _MARK.search(text, place)) is not None:
        place = mark.end()
        kind = mark[0]
        num_marks += 1
        if num_marks > MAX_MARKS:
            raise BadRequestError(
                f"the body has over {MAX_MARKS:,} strings, lists and objects: send less"
            )
        if kind == b'"':
            end = _end_of_string(text, place)
            if objects and objects[-1] is not None and _COLON.match(text, end + 1):
                _add_name(objects[-1], text[place:end])
            place = end + 1
        elif kind == b"{":
            objects.append(set())
        elif kind == b"[":
            objects.append(None)
        elif objects:
            objects.pop()


def _end_of_string(text: bytes, start: int) -> int:
    """The place of the quote that ends the string; the text's end if there is none.

    Raises BadRequestError at U+0000.
    """
    quote = text.find(b'"', start)
    if quote >= 0 and text.find(b"\\", start, quote) < 0:
        return quote
    place = start
    while place < len(text) and text[place] != 0x22:
        run = _RUN.match(text, place)
        assert run is not None, "the pattern takes any text"
        if run.end() == place:
            # A backslash that no run takes: the text ends here, or this is the escape of U+0000.
            if place + 1 < len(text):
                raise _nul_error(text)
            return len(text)
        place = run.end()
    return place


def _nul_error(text: bytes) -> BadRequestError:
    """The error, with the field that contains the character if the text can be decoded."""
    try:
        field = _field_with_nul(msgspec.json.decode(text))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        field = None
    shown = (field or "the body")[:200]
    return BadRequestError(
        f"{shown} contains the character U+0000: remove it", param=field and field[:200]
    )


def _field_with_nul(body: Any) -> str | None:
    """The path of the first text or name that contains U+0000."""
    waiting = [("", body)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, str) and "\0" in value:
            return path or None
        if isinstance(value, list):
            waiting += [(f"{path}[{i}]", one) for i, one in reversed(list(enumerate(value)))]
        if isinstance(value, dict):
            if any("\0" in name for name in value):
                return path or None
            prefix = f"{path}." if path else ""
            waiting += [(prefix + name, one) for name, one in reversed(value.items())]
    return None


def _add_name(names: set[bytes], written: bytes) -> None:
    name = _as_text(written) if b"\\" in written else written
    if name in names:
        shown = name[:64].decode(errors="replace")
        raise BadRequestError(f"the name {shown!r} occurs twice in one object: send it once")
    names.add(name)


def _as_text(written: bytes) -> bytes:
    """The name with its escapes decoded; unchanged if it is not JSON."""
    try:
        return msgspec.json.decode(b'"' + written + b'"', type=str).encode()
    except (msgspec.DecodeError, UnicodeDecodeError):
        return written
