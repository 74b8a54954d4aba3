"""Strict JSON: a body becomes a schema's object or a 400 that names the field.

Owns what is not JSON here (NaN, Infinity, lone surrogates, numbers without end)
and what becomes of unknown fields. Knows no schema.
"""

from __future__ import annotations

import logging
import math
import re
from typing import Annotated, Any, TypeVar

import msgspec

from ..errors import BadRequestError

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=msgspec.Struct)

MAX_IGNORED_FIELDS = 64
# Beyond it a float does not tell one integer from the next.
MAX_WHOLE_FLOAT = 2.0**53
MAX_NUMBERS = 10_000

# By this title the API's document finds where to tell the names that a server has.
SERVED_MODEL = "Served model"
ModelName = Annotated[str, msgspec.Meta(max_length=1024, title=SERVED_MODEL)]

_AT = " - at `$"
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<field>.*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<field>.*)`$", re.DOTALL)
_STEP = re.compile(r"\[\.\.\.\]|\[[0-9]{1,9}\]|[^.\[\]]+")


def decode_body(body: bytes, schema: type[T], *, ignore_unknown: bool = False) -> T:
    """The body as a `schema`; unknown fields are refused, or logged and dropped.

    Raises BadRequestError whose `param` is the path of the field.
    """
    if not body:
        raise BadRequestError("the request has no body: send a JSON object")
    try:
        if ignore_unknown:
            return _convert_without_unknown(_any_json(body), schema)
        return _decode(body, schema)
    except msgspec.ValidationError as error:
        raise _named(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequestError(f"the body is not valid JSON: {_reason(error)}") from None


def _decode(body: bytes, schema: type[T]) -> T:
    """JSON has one kind of number, so 256.0 stands for an integer too."""
    try:
        return msgspec.json.decode(body, type=schema)
    except msgspec.ValidationError as error:
        if "got `float`" not in str(error):
            raise
    return msgspec.convert(_any_json(body), schema)


def _any_json(body: bytes) -> Any:
    """The body without a schema; its whole floats as integers, unless it has very many numbers."""
    # A call of Python's a float: a million would hold up everyone's streams for half a second.
    has_few = body.count(b",") < MAX_NUMBERS
    return (_WHOLE_NUMBERS if has_few else _AS_WRITTEN).decode(body)


def _whole(text: str) -> int | float:
    value = float(text)
    if not math.isfinite(value):
        raise msgspec.DecodeError("a number is out of range")
    return int(value) if value.is_integer() and abs(value) <= MAX_WHOLE_FLOAT else value


_WHOLE_NUMBERS = msgspec.json.Decoder(float_hook=_whole)
_AS_WRITTEN = msgspec.json.Decoder()


def no_nul(text: str, field: str) -> str:
    """The text itself. Raises BadRequestError if it holds U+0000."""
    if "\0" in text:
        raise BadRequestError(f"{field} holds the character U+0000: remove it", param=field)
    return text


def _convert_without_unknown(raw: Any, schema: type[T]) -> T:
    """Drop one unknown field a round, each with a log line, until none is left."""
    for _ in range(MAX_IGNORED_FIELDS):
        try:
            return msgspec.convert(raw, schema)
        except msgspec.ValidationError as error:
            problem, path = _split(error)
            unknown = _UNKNOWN.match(problem)
            if unknown is None or not _drop(raw, path, unknown["field"]):
                raise
            logger.warning("ignored the unknown field %r", _join(path, unknown["field"])[:200])
    raise BadRequestError(f"more than {MAX_IGNORED_FIELDS} unknown fields: remove them")


def _split(error: msgspec.ValidationError) -> tuple[str, str]:
    """msgspec's message without its place, and the place without its `$`.

    The message may quote the client: only its end says where, and for what stands at the top of the
    body even that may be a client's word.
    """
    problem, at, path = str(error).rpartition(_AT)
    if not at or not path.endswith("`"):
        return str(error), ""
    return problem, path[:-1].removeprefix(".")


def _drop(raw: Any, path: str, field: str) -> bool:
    """Take the field out of the object at this place; False where it is not there.

    Of a mapping msgspec tells no key (`[...]`), but its values are of one type, without the field.
    """
    places = [raw]
    for step in _STEP.findall(path):
        if step == "[...]":
            places = [inner for one in places for inner in _values(one)]
        elif step.startswith("["):
            index = int(step[1:-1])
            places = [one[index] for one in places if isinstance(one, list) and index < len(one)]
        else:
            places = [one[step] for one in places if isinstance(one, dict) and step in one]
    found = [one for one in places if isinstance(one, dict) and field in one]
    for one in found:
        del one[field]
    return bool(found)


def _values(one: Any) -> list[Any]:
    return list(one.values()) if isinstance(one, dict) else one if isinstance(one, list) else []


def _join(path: str, field: str) -> str:
    return f"{path}.{field}" if path else field


def _named(error: msgspec.ValidationError) -> BadRequestError:
    """The error in a client's words, with the field's path as `param`."""
    problem, path = _split(error)
    if unknown := _UNKNOWN.match(problem):
        field = _join(path, unknown["field"])[:200]
        return BadRequestError(
            f"{field} is not a field of this API: remove it (a server started with"
            " --unknown-fields ignore drops it)",
            param=field,
        )
    if missing := _MISSING.match(problem):
        field = _join(path, missing["field"])
        return BadRequestError(f"{field} is required", param=field)
    if not path:
        return BadRequestError(f"the body does not fit: {problem}")
    return BadRequestError(f"{path}: {problem[:300]}", param=path)


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if "truncated" in str(error):
        return "it ends too early, or holds half of a surrogate pair"
    return str(error)[:200]
