"""JSON in parts: lists that are text from the start, and documents that contain them.

A whole answer's log-probabilities are most of its bytes. They are encoded as the tokens come and
never joined: each part is sent and freed. Knows nothing of any API's shapes.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from ..generation.token_text import TokenEntry

PART_BYTES = 64 * 1024


class JsonList:
    """A growing JSON list, kept as text in parts of about PART_BYTES bytes."""

    __slots__ = ("_full", "_last", "num_entries")

    def __init__(self) -> None:
        self._full: list[bytes] = []
        self._last = bytearray()
        self.num_entries = 0

    def extend(self, entries: Sequence[object]) -> None:
        """Encode entries and append them."""
        if not entries:
            return
        text = orjson.dumps(entries)
        self._last += b"," if self.num_entries else b""
        self._last += memoryview(text)[1:-1]
        self.num_entries += len(entries)
        if len(self._last) >= PART_BYTES:
            self._end_part()

    def append(self, later: JsonList) -> None:
        """Append the entries of another list, which does not change."""
        if not later.num_entries:
            return
        self._last += b"," if self.num_entries else b""
        self._end_part()
        self._full += later._full
        self._last += later._last
        self.num_entries += later.num_entries

    def _end_part(self) -> None:
        self._full.append(bytes(self._last))
        self._last = bytearray()

    def parts(self) -> list[bytes]:
        """The list's text, with its brackets."""
        return [b"[", *self._full, bytes(self._last), b"]"]

    def as_json(self) -> Any:
        """The list as a value of a document for `json_parts`, in place of a list."""
        return self


class EntryTexts(JsonList):
    """One JSON value for each token of an answer. encode: the value of a token."""

    __slots__ = ("_encode",)

    def __init__(self, encode: Callable[[TokenEntry], object]) -> None:
        super().__init__()
        self._encode = encode

    def add(self, entries: Sequence[TokenEntry]) -> None:
        """Add the next tokens of the answer."""
        self.extend([self._encode(entry) for entry in entries])


def json_parts(content: object) -> list[bytes]:
    """The JSON of a document whose JsonLists stay in parts."""
    lists: list[JsonList] = []
    # No text of a client can contain it.
    mark = secrets.token_hex(16).encode()

    def put(value: object) -> orjson.Fragment:
        if not isinstance(value, JsonList):
            raise TypeError(f"{type(value).__name__} has no JSON")
        lists.append(value)
        return orjson.Fragment(mark)

    first, *others = orjson.dumps(content, default=put).split(mark)
    parts = [first]
    for one, text in zip(lists, others, strict=True):
        parts += [*one.parts(), text]
    return parts
