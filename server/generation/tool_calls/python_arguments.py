"""Turns the keyword arguments of a Python call into a JSON object, without evaluating them.

Owns literals: strings, numbers, True, False, None, lists, tuples and dictionaries.
Every character is looked at once. Knows nothing of calls or of tools.
"""

from __future__ import annotations

import json
import re
import sys

MAX_DEPTH = 32

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<number>-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)(?![\w.])
        |(?P<word>[^\W\d]\w*)
        |(?P<mark>[][(){},:=])
        |(?P<quote>["'])
        |(?P<end>\Z)
    )""",
    re.VERBOSE,
)
_WORDS = {"True": "true", "False": "false", "None": "null"} | {
    word: word for word in ("true", "false", "null")
}
_INSIDE = {'"': re.compile(r'[^"\\]+'), "'": re.compile(r"[^'\\]+")}
_ESCAPE = re.compile(
    r"\\(?:x(?P<x>[0-9a-fA-F]{2})|u(?P<u>[0-9a-fA-F]{4})|U(?P<U>[0-9a-fA-F]{8})|(?P<one>.))",
    re.DOTALL,
)
_ESCAPED = {
    "n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v",
    "\\": "\\", "'": "'", '"': '"', "\n": "",
}  # fmt: skip
_CLOSING = {"[": "]", "(": ")", "{": "}"}


class NotLiteralError(ValueError):
    """The text is not made of keyword arguments whose values are literals."""


def json_of_arguments(text: str) -> str:
    """The JSON object that `key=literal, ...` stands for, as text.

    Raises NotLiteralError where the text is anything else.
    """
    reader = _Reader(text)
    pairs: dict[str, str] = {}
    while reader.kind != "end":
        name = reader.take("word")
        reader.take("=")
        if name in pairs:
            raise NotLiteralError(f"the argument {name[:64]!r} comes twice")
        pairs[name] = reader.value(0)
        if reader.kind != "end":
            reader.take(",")
    return "{" + ", ".join(f"{json.dumps(key)}: {value}" for key, value in pairs.items()) + "}"


class _Reader:
    """Reads token by token; `kind` is the next one's: a mark itself, or its group's name."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._place = 0
        self._token = ""
        self.kind = ""
        self._advance()

    def take(self, kind: str) -> str:
        """The next token, which must be of this kind."""
        if self.kind != kind:
            raise NotLiteralError(f"expected {kind}, found {self.kind}")
        token = self._token
        self._advance()
        return token

    def value(self, depth: int) -> str:
        """The JSON of the literal that begins here."""
        if depth > MAX_DEPTH:
            raise NotLiteralError(f"nested deeper than {MAX_DEPTH}")
        if self.kind == "quote":
            return self._string()
        if self.kind == "word":
            word = self.take("word")
            if word not in _WORDS:
                raise NotLiteralError(f"{word[:64]!r} is no literal")
            return _WORDS[word]
        if self.kind in _CLOSING:
            return self._collection(self.kind, depth)
        return self.take("number")

    def _advance(self) -> None:
        match = _TOKEN.match(self._text, self._place)
        if match is None or match.lastgroup is None:
            raise NotLiteralError("not a literal")
        self._token = match[match.lastgroup]
        self._place = match.end()
        self.kind = self._token if match.lastgroup == "mark" else match.lastgroup

    def _collection(self, opening: str, depth: int) -> str:
        self.take(opening)
        closing = _CLOSING[opening]
        items: list[str] = []
        while self.kind != closing:
            items.append(self._pair(depth) if opening == "{" else self.value(depth + 1))
            if self.kind != closing:
                self.take(",")
        self.take(closing)
        inside = ", ".join(items)
        return f"{{{inside}}}" if opening == "{" else f"[{inside}]"

    def _pair(self, depth: int) -> str:
        if self.kind != "quote":
            raise NotLiteralError("a key is a string")
        key = self._string()
        self.take(":")
        return f"{key}: {self.value(depth + 1)}"

    def _string(self) -> str:
        """One or more strings side by side, as Python joins them."""
        parts: list[str] = []
        while self.kind == "quote":
            self._read_string(self._token, parts)
            self._advance()
        try:
            # Escaped pairs become one character.
            joined = "".join(parts).encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError as error:
            raise NotLiteralError("half of a surrogate pair") from error
        return json.dumps(joined, ensure_ascii=False)

    def _read_string(self, quote: str, parts: list[str]) -> None:
        while True:
            inside = _INSIDE[quote].match(self._text, self._place)
            if inside is not None:
                parts.append(inside[0])
                self._place = inside.end()
            if self._text.startswith(quote, self._place):
                self._place += 1
                return
            escape = _ESCAPE.match(self._text, self._place)
            if escape is None:
                raise NotLiteralError("a string has no end")
            parts.append(_unescaped(escape))
            self._place = escape.end()


def _unescaped(escape: re.Match[str]) -> str:
    digits = escape["x"] or escape["u"] or escape["U"]
    if digits is not None:
        code = int(digits, 16)
        if code > sys.maxunicode:
            raise NotLiteralError(f"{digits} is no character")
        return chr(code)
    return _ESCAPED.get(escape["one"], escape[0])
