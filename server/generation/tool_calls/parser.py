"""Finds tool calls in an answer while it is generated.

Owns the forms in which Llama 3 writes calls. Buffers only text that may still become a call.
Reads each character once, so hostile text costs no more than other text. Knows nothing of
tokens, ids of calls or HTTP.

Forms, where NAME is the name of an offered tool; anything else is text:

    {"name": "NAME", "parameters": {...}}      at the start, or after another
                                               call; also in a list, also with
                                               "arguments", "type" and "id"
    <function=NAME>{...}</function>            anywhere
    <|python_tag|>NAME.call(key=literal, ...)  anywhere; also without ".call",
                                               also a call in JSON
    [NAME(key=literal, ...), ...]              at the start
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from .pieces import ParsedPiece, PieceWriter
from .python_arguments import NotLiteralError, json_of_arguments

# Symbols of the machine besides single characters.
_END = "END"
_PYTHON_TAG = "PYTHON_TAG"

_SPACE = frozenset(" \t\r\n")
_BETWEEN = _SPACE | frozenset(";,[]")
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_")
_OPENING, _CLOSING, _QUOTES = frozenset("[{("), frozenset("]})"), frozenset("\"'")
_ARGUMENT_KEYS = frozenset({"parameters", "arguments"})
_KEYS = _ARGUMENT_KEYS | {"name", "type", "id"}
_MAX_VALUE_CHARS = 128

_JSON_QUOTES = frozenset('"')

# A step reads symbols and returns the first one that it did not read.
Steps = Generator[None, str, str]


class Found(NamedTuple):
    """The value, or None, and the first unread symbol."""

    value: str | None
    symbol: str


class Whole(NamedTuple):
    """Whether the bracket was closed, and the first unread symbol."""

    is_whole: bool
    symbol: str


@dataclass(slots=True)
class _JsonCall:
    """A JSON call so far. early: its arguments, if they came before its name."""

    name: str | None = None
    early: list[str] = field(default_factory=list)
    is_complete: bool = False
    is_broken: bool = False


class ToolCallParser:
    """Parses one answer. names: of the offered tools; max_calls None: any number.

    `is_done` is true once max_calls calls are complete; further text is dropped.
    """

    def __init__(self, names: Collection[str], max_calls: int | None = None) -> None:
        self._out = PieceWriter()
        self._max_calls = max_calls
        self._machine = _Machine(frozenset(names), self._out).answer()
        next(self._machine)

    @property
    def is_done(self) -> bool:
        return self._out.num_closed == self._max_calls

    def push(self, text: str) -> list[ParsedPiece]:
        """Return the pieces that are certain after this text."""
        return self._feed(text)

    def push_python_tag(self) -> list[ParsedPiece]:
        """The same for the special token <|python_tag|>, which has no text."""
        return self._feed([_PYTHON_TAG])

    def flush(self) -> list[ParsedPiece]:
        """End the answer; return the last pieces."""
        return self._feed([_END])

    def _feed(self, symbols: Iterable[str]) -> list[ParsedPiece]:
        for symbol in symbols:
            if self.is_done:
                break
            self._machine.send(symbol)
        return self._out.take()


class _Machine:
    """The grammar of answers. Each method gets the first symbol to read.

    A method that finds no call leaves what it read in the buffer; its caller decides.
    """

    def __init__(self, names: frozenset[str], out: PieceWriter) -> None:
        self._names = names
        self._python_names = names | {f"{name}.call" for name in names}
        self._out = out

    def answer(self) -> Generator[None, str, None]:
        symbol = yield from self._calls((yield), is_tagged=False)
        while True:
            if symbol == _PYTHON_TAG:
                symbol = yield from self._calls((yield), is_tagged=True)
            elif symbol == "<":
                symbol = yield from self._first_call(symbol, is_python=False)
            else:
                if symbol != _END:
                    self._out.write_text(symbol)
                symbol = yield

    def _calls(self, symbol: str, is_tagged: bool) -> Steps:
        """All calls from here on, at a place where calls may start; or text."""
        symbol = yield from self._skip(symbol, _SPACE)
        is_list = symbol == "["
        if is_list:
            self._out.buffer(symbol)
            symbol = yield from self._skip((yield), _SPACE)
        return (yield from self._first_call(symbol, is_tagged or is_list))

    def _first_call(self, symbol: str, is_python: bool) -> Steps:
        """One call and those after it, or text."""
        num_opened = self._out.num_opened
        symbol = yield from self._call(symbol, is_python)
        while self._out.num_opened > num_opened:
            num_opened = self._out.num_opened
            symbol = yield from self._skip(symbol, _BETWEEN)
            if symbol == _END:
                self._out.end_calls(_BETWEEN)
                return symbol
            symbol = yield from self._call(symbol, is_python)
        self._out.write_buffer()
        return symbol

    def _call(self, symbol: str, is_python: bool) -> Steps:
        if symbol == "{":
            return (yield from self._json_call(symbol))
        if symbol == "<":
            return (yield from self._tagged_call(symbol))
        if is_python and symbol in _LETTERS:
            return (yield from self._python_call(symbol))
        return symbol

    def _json_call(self, symbol: str) -> Steps:
        """`{"name": ..., "parameters": {...}}`, its keys in any order."""
        call = _JsonCall()
        while symbol in ("{", ",") and not call.is_broken:
            self._out.buffer(symbol)
            symbol = yield from self._skip((yield), _SPACE)
            key, symbol = yield from self._string(symbol, _KEYS)
            symbol = yield from self._skip(symbol, _SPACE)
            if key is None or symbol != ":":
                break
            self._out.buffer(symbol)
            symbol = yield from self._skip((yield), _SPACE)
            symbol = yield from self._member(key, symbol, call)
            symbol = yield from self._skip(symbol, _SPACE)
        if not call.is_complete:
            return symbol
        if symbol != "}":
            self._out.close_call(is_clean=False)
            return symbol
        self._out.buffer(symbol)
        self._out.close_call()
        return (yield)

    def _member(self, key: str, symbol: str, call: _JsonCall) -> Steps:
        """The value of one key. Opens the call as soon as its name and arguments are known."""
        if key not in _ARGUMENT_KEYS:
            value, symbol = yield from self._string(symbol, self._names if key == "name" else None)
            call.is_broken = value is None or (key == "name" and call.name is not None)
            call.name = value if key == "name" and not call.is_broken else call.name
        elif symbol != "{" or call.early or call.is_complete:
            call.is_broken = True
        elif call.name is None:
            write = call.early.append
            is_whole, symbol = yield from self._object(symbol, lambda c: write(self._buffered(c)))
            call.is_broken = not is_whole
        else:
            self._out.open_call(call.name)
            call.is_complete, symbol = yield from self._object(symbol, self._write_argument)
            call.is_broken = not call.is_complete
        if call.early and call.name is not None and not (call.is_complete or call.is_broken):
            self._out.open_call(call.name)
            self._out.write_argument("".join(call.early))
            call.is_complete = True
        return symbol

    def _tagged_call(self, symbol: str) -> Steps:
        """`<function=NAME>{...}</function>`, or several of which only the last has an end tag."""
        self._out.buffer(symbol)
        symbol = yield
        while True:
            for expected in "function=":
                if symbol != expected:
                    return symbol
                self._out.buffer(symbol)
                symbol = yield
            name, symbol = yield from self._name(symbol, self._names)
            if name is None or symbol != ">":
                return symbol
            self._out.buffer(symbol)
            symbol = yield from self._skip((yield), _SPACE)
            if symbol != "{":
                return symbol
            self._out.open_call(name)
            is_whole, symbol = yield from self._object(symbol, self._write_argument)
            if not is_whole:
                return symbol
            symbol = yield from self._skip(symbol, _SPACE)
            if symbol != "<":
                self._out.close_call(is_clean=False)
                return symbol
            self._out.buffer(symbol)
            symbol = yield
            if symbol == "/":
                return (yield from self._end_tag(symbol))
            self._out.close_call(is_clean=False)

    def _end_tag(self, symbol: str) -> Steps:
        for expected in "/function>":
            if symbol != expected:
                self._out.close_call(is_clean=False)
                return symbol
            self._out.buffer(symbol)
            if expected == ">":
                self._out.close_call()
            symbol = yield
        return symbol

    def _python_call(self, symbol: str) -> Steps:
        """`NAME(key=literal, ...)` or `NAME.call(key=literal, ...)`, buffered to its end."""
        name, symbol = yield from self._name(symbol, self._python_names)
        if name is None or symbol != "(":
            return symbol
        text: list[str] = []
        is_whole, symbol = yield from self._object(
            symbol, lambda c: text.append(self._buffered(c)), _QUOTES
        )
        if not is_whole:
            return symbol
        try:
            arguments = json_of_arguments("".join(text[1:-1]))
        except NotLiteralError:
            return symbol
        self._out.open_call(name.removesuffix(".call"))
        self._out.write_argument(arguments)
        self._out.close_call()
        return symbol

    # Single symbols and values

    def _buffered(self, character: str) -> str:
        self._out.buffer(character)
        return character

    def _write_argument(self, character: str) -> None:
        self._out.write_argument(character, character)

    def _skip(self, symbol: str, characters: frozenset[str]) -> Steps:
        while symbol in characters:
            self._out.buffer(symbol)
            symbol = yield
        return symbol

    def _name(self, symbol: str, names: frozenset[str]) -> Generator[None, str, Found]:
        """The longest text here that starts one of the names; None if it is not a whole name."""
        name = ""
        while len(symbol) == 1 and any(one.startswith(name + symbol) for one in names):
            name += symbol
            self._out.buffer(symbol)
            symbol = yield
        return Found(name if name in names else None, symbol)

    def _string(self, symbol: str, values: frozenset[str] | None) -> Generator[None, str, Found]:
        """A JSON string without escapes: one of the values, or any short string."""
        if symbol != '"':
            return Found(None, symbol)
        self._out.buffer(symbol)
        if values is None:
            value, symbol = yield from self._any_value((yield))
        else:
            value, symbol = yield from self._name((yield), values)
        if value is None or symbol != '"':
            return Found(None, symbol)
        self._out.buffer(symbol)
        return Found(value, (yield))

    def _any_value(self, symbol: str) -> Generator[None, str, Found]:
        value = ""
        while len(symbol) == 1 and symbol not in '"\\\n' and len(value) < _MAX_VALUE_CHARS:
            value += symbol
            self._out.buffer(symbol)
            symbol = yield
        return Found(value, symbol)

    def _object(
        self, symbol: str, write: Callable[[str], object], quotes: frozenset[str] = _JSON_QUOTES
    ) -> Generator[None, str, Whole]:
        """Everything up to the closing bracket. Brackets of all kinds count alike, and the text
        between them is not checked."""
        depth, quote, is_escaped = 0, "", False
        while len(symbol) == 1:
            write(symbol)
            if quote:
                is_end = symbol == quote and not is_escaped
                is_escaped = symbol == "\\" and not is_escaped
                quote = "" if is_end else quote
            elif symbol in quotes:
                quote = symbol
            else:
                depth += (symbol in _OPENING) - (symbol in _CLOSING)
                if depth == 0:
                    return Whole(True, (yield))
            symbol = yield
        return Whole(False, symbol)
