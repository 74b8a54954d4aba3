"""Turns the keyword arguments of a Python call into a JSON object, without evaluating them.

Owns the literals: strings, numbers, True, False, None, lists, tuples and dictionaries. Python's
own parser reads the text, and only its tree is used. Knows nothing of calls or tools.
"""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from typing import Any

MAX_DEPTH = 32
# As long as a tool's schema may be. The bound limits the parser's time and memory.
MAX_CHARS = 65_536

_JSON_WORDS = {"true": True, "false": False, "null": None}
# Strings, and the names before an equals sign.
_STRING_OR_NAME = re.compile(
    r"""\"(?:\\.|[^"\\])*+\"|'(?:\\.|[^'\\])*+'|(?<!\w)(?P<name>[^\W\d]\w*+)(?=\s*+=(?!=))""",
    re.DOTALL,
)
# Put before each name: a parameter of a tool may be named as a word of Python, such as `from`.
_NAME_PREFIX = "k_"
_LINE_ENDS = re.compile(r"\\.|[\r\n]", re.DOTALL)
_ESCAPED = {"\n": r"\n", "\r": r"\r"}


class NotLiteralError(ValueError):
    """The text is not a list of keyword arguments whose values are literals."""


def json_of_arguments(text: str) -> str:
    """The JSON object, as text, for the arguments `key=literal, ...`.

    Raises NotLiteralError if the text is anything else.
    """
    values: dict[str, Any] = {}
    for keyword in _keywords(text):
        if keyword.arg is None or not keyword.arg.startswith(_NAME_PREFIX):
            raise NotLiteralError("an argument has no plain name")
        name = keyword.arg.removeprefix(_NAME_PREFIX)
        if name in values:
            raise NotLiteralError("an argument comes twice")
        values[name] = _value(keyword.value, 0)
    return json.dumps(values, ensure_ascii=False)


def _keywords(text: str) -> list[ast.keyword]:
    if len(text) > MAX_CHARS:
        raise NotLiteralError(f"longer than {MAX_CHARS:,} characters")
    try:
        with warnings.catch_warnings():
            # Python warns of escapes that it does not know, such as \q.
            warnings.simplefilter("ignore")
            call = ast.parse(f"f({_STRING_OR_NAME.sub(_plain, text)})", mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        # The parser raises MemoryError for nesting that is too deep for it.
        raise NotLiteralError("not Python") from error
    # A bracket in the text may close the call early: then another node is at the top.
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise NotLiteralError("not keyword arguments")
    return call.keywords


def _plain(found: re.Match[str]) -> str:
    """A name with its prefix, or a string with its line ends escaped: models write them so."""
    if found["name"] is not None:
        return _NAME_PREFIX + found[0]
    return _LINE_ENDS.sub(lambda part: _ESCAPED.get(part[0], part[0]), found[0])


def _value(node: ast.expr, depth: int) -> Any:
    """The value of a literal, as JSON has it."""
    if depth > MAX_DEPTH:
        raise NotLiteralError(f"nested deeper than {MAX_DEPTH}")
    match node:
        case ast.Constant(value=str(text)):
            return _joined_surrogates(text)
        case ast.Constant(value=bool() | None as word):
            return word
        case ast.Constant(value=int() as number):
            return number
        case ast.Constant(value=float() as number) if math.isfinite(number):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant() as operand):
            return _negative(_value(operand, depth + 1))
        case ast.Name(id=word) if word in _JSON_WORDS:
            return _JSON_WORDS[word]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item, depth + 1) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {
                _key(key): _value(value, depth + 1) for key, value in zip(keys, values, strict=True)
            }
    raise NotLiteralError(f"{type(node).__name__} is not a literal")


def _key(node: ast.expr | None) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return _joined_surrogates(text)
    raise NotLiteralError("a key is not a string")


def _negative(number: Any) -> int | float:
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise NotLiteralError("only a number can be negative")
    return -number


def _joined_surrogates(text: str) -> str:
    r"""The text with pairs such as \ud83d\udc3b as one character."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError as error:
        raise NotLiteralError("half of a surrogate pair") from error
