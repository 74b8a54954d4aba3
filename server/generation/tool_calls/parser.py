"""Finds tool calls in an answer while it is written.

Owns the forms in which Llama 3 writes calls, and what is held back: only text
that may still become a call. Each character is looked at once, so hostile text
costs no more than other text. Knows nothing of tokens, ids of calls or HTTP.

Forms, where NAME is the name of an offered tool; anything else is text:

    {"name": "NAME", "parameters": {...}}      at the beginning, or after another
                                               call; also in a list, also with
                                               "arguments", "type" and "id"
    <function=NAME>{...}</function>            anywhere
    <|python_tag|>NAME.call(key=literal, ...)  anywhere; also without ".call",
                                               also a call in JSON
    [NAME(key=literal, ...), ...]              at the beginning
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from .pieces import ParsedPiece, PieceWriter
from .python_arguments import NotLiteralError, json_of_arguments

# What the machine is fed besides single characters.
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

# A step of the machine reads symbols and ends with the first that it left unread.
Steps = Generator[None, str, str]


class Found(NamedTuple):
    """A value that was read, or None; and the first symbol that was left unread."""

    value: str | None
    symbol: str


class Whole(NamedTuple):
    """Whether a bracket found its end; and the first symbol that was left unread."""

    is_whole: bool
    symbol: str


@dataclass(slots=True)
class _JsonCall:
    """What is known of a JSON call. early: its arguments, where they came before its name."""

    name: str | None = None
    early: list[str] = field(default_factory=list)
    is_complete: bool = False
    is_broken: bool = False


class ToolCallParser:
    """Reads one answer. names: of the offered tools; max_calls None: any number.

    `is_done` is set when max_calls are complete; what follows is dropped.
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
        """What became certain with this text."""
        return self._feed(text)

    def push_python_tag(self) -> list[ParsedPiece]:
        """The same for the special token, which has no text."""
        return self._feed([_PYTHON_TAG])

    def flush(self) -> list[ParsedPiece]:
        """What is left at the end of the answer."""
        return self._feed([_END])

    def _feed(self, symbols: Iterable[str]) -> list[ParsedPiece]:
        for symbol in symbols:
            if self.is_done:
                break
            self._machine.send(symbol)
        return self._out.take()


class _Machine:
    """The grammar of answers. Each method is handed the first symbol that it may read.

    A method that finds no call leaves what it read held; its caller decides.
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
        """All calls that begin here, at a place for calls; or text."""
        symbol = yield from self._skip(symbol, _SPACE)
        is_list = symbol == "["
        if is_list:
            self._out.hold(symbol)
            symbol = yield from self._skip((yield), _SPACE)
        return (yield from self._first_call(symbol, is_tagged or is_list))

    def _first_call(self, symbol: str, is_python: bool) -> Steps:
        """One call and those behind it, or text."""
        num_opened = self._out.num_opened
        symbol = yield from self._call(symbol, is_python)
        while self._out.num_opened > num_opened:
            num_opened = self._out.num_opened
            symbol = yield from self._skip(symbol, _BETWEEN)
            if symbol == _END:
                self._out.end_calls(_BETWEEN)
                return symbol
            symbol = yield from self._call(symbol, is_python)
        self._out.write_held()
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
            self._out.hold(symbol)
            symbol = yield from self._skip((yield), _SPACE)
            key, symbol = yield from self._string(symbol, _KEYS)
            symbol = yield from self._skip(symbol, _SPACE)
            if key is None or symbol != ":":
                break
            self._out.hold(symbol)
            symbol = yield from self._skip((yield), _SPACE)
            symbol = yield from self._member(key, symbol, call)
            symbol = yield from self._skip(symbol, _SPACE)
        if not call.is_complete:
            return symbol
        if symbol != "}":
            self._out.close_call(is_clean=False)
            return symbol
        self._out.hold(symbol)
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
            is_whole, symbol = yield from self._object(symbol, lambda c: write(self._held(c)))
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
        """`<function=NAME>{...}</function>`, and more that begin where the end is missing."""
        self._out.hold(symbol)
        symbol = yield
        while True:
            for expected in "function=":
                if symbol != expected:
                    return symbol
                self._out.hold(symbol)
                symbol = yield
            name, symbol = yield from self._name(symbol, self._names)
            if name is None or symbol != ">":
                return symbol
            self._out.hold(symbol)
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
            self._out.hold(symbol)
            symbol = yield
            if symbol == "/":
                return (yield from self._end_tag(symbol))
            self._out.close_call(is_clean=False)

    def _end_tag(self, symbol: str) -> Steps:
        for expected in "/function>":
            if symbol != expected:
                self._out.close_call(is_clean=False)
                return symbol
            self._out.hold(symbol)
            if expected == ">":
                self._out.close_call()
            symbol = yield
        return symbol

    def _python_call(self, symbol: str) -> Steps:
        """`NAME(key=literal, ...)` or `NAME.call(key=literal, ...)`, held to its end."""
        name, symbol = yield from self._name(symbol, self._python_names)
        if name is None or symbol != "(":
            return symbol
        text: list[str] = []
        is_whole, symbol = yield from self._object(
            symbol, lambda c: text.append(self._held(c)), _QUOTES
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

    # The smallest steps.

    def _held(self, character: str) -> str:
        self._out.hold(character)
        return character

    def _write_argument(self, character: str) -> None:
        self._out.write_argument(character, character)

    def _skip(self, symbol: str, characters: frozenset[str]) -> Steps:
        while symbol in characters:
            self._out.hold(symbol)
            symbol = yield
        return symbol

    def _name(self, symbol: str, names: frozenset[str]) -> Generator[None, str, Found]:
        """The name that is written here up to the first character that is of none; or None."""
        name = ""
        while len(symbol) == 1 and any(one.startswith(name + symbol) for one in names):
            name += symbol
            self._out.hold(symbol)
            symbol = yield
        return Found(name if name in names else None, symbol)

    def _string(self, symbol: str, values: frozenset[str] | None) -> Generator[None, str, Found]:
        """A JSON string without escapes, of one of the values, or any short one."""
        if symbol != '"':
            return Found(None, symbol)
        self._out.hold(symbol)
        if values is None:
            value, symbol = yield from self._any_value((yield))
        else:
            value, symbol = yield from self._name((yield), values)
        if value is None or symbol != '"':
            return Found(None, symbol)
        self._out.hold(symbol)
        return Found(value, (yield))

    def _any_value(self, symbol: str) -> Generator[None, str, Found]:
        value = ""
        while len(symbol) == 1 and symbol not in '"\\\n' and len(value) < _MAX_VALUE_CHARS:
            value += symbol
            self._out.hold(symbol)
            symbol = yield
        return Found(value, symbol)

    def _object(
        self, symbol: str, write: Callable[[str], object], quotes: frozenset[str] = _JSON_QUOTES
    ) -> Generator[None, str, Whole]:
        """All up to the bracket that closes the one here. Brackets of all kinds count alike:
        whether the text between them is sound is another's question."""
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
