"""Strict JSON: decodes a body into a schema's object, or raises an error that names the field.

Owns what is not JSON here (NaN, Infinity, lone surrogates, numbers out of range) and the handling
of unknown fields. First `decode_body`, then how an error is worded. Knows no schema.
"""

from __future__ import annotations

import codecs
import itertools
import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec

from ..errors import BadRequestError
from .allowed_values import choice_at, shown
from .foreign import REJECTED
from .lenient import UnknownField, is_misspelt, lenient, unknown_fields

T = TypeVar("T", bound=msgspec.Struct)

# report: drop and name them, but reject misspelt known names. error: the older name of refuse.
UnknownFields = Literal["report", "refuse", "ignore", "error"]
# How many unknown fields of one body are named, and how much of a name is shown.
MAX_NAMED_FIELDS = 20
MAX_NAME_CHARS = 200
# How many are compared with known names, which takes up to 0.2 ms each.
MAX_COMPARED_FIELDS = 200
# Above it a float no longer separates one integer from the next.
MAX_WHOLE_FLOAT = 2.0**53
MAX_NUMBERS = 10_000

# The API's document finds the model's field by this title, and lists the served names there.
SERVED_MODEL = "Served model"
ModelName = Annotated[str, msgspec.Meta(max_length=1024, title=SERVED_MODEL)]

_AT = " - at `$"
_STEP = re.compile(r"(?:^|\.)(?P<name>[^.\[]+)|\[(?P<index>[0-9]+)\]")
_MISSING = re.compile(r"^Object missing required field `(?P<field>.*)`$", re.DOTALL)


@dataclass(slots=True, frozen=True)
class LenientBody(Generic[T]):
    """A body without its unknown fields.

    unknown_fields: paths of the first MAX_NAMED_FIELDS. misspelt: the first of them that looks
    like a known field, and that field's path.
    """

    value: T
    unknown_fields: list[str] = field(default_factory=list)
    misspelt: tuple[str, str] | None = None


def decode_body(body: bytes, schema: type[T], unknown: UnknownFields = "refuse") -> T:
    """The body, by `decode_with_names` without the names."""
    return decode_with_names(body, schema, unknown).value


def decode_with_names(body: bytes, schema: type[T], unknown: UnknownFields) -> LenientBody[T]:
    """Decode the body; unknown fields are dropped and named, or rejected.

    Raises BadRequestError whose `param` is the path of the field.
    """
    body = without_bom(body)
    try:
        return LenientBody(msgspec.json.decode(body, type=schema))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        # decode_leniently finds out what is wrong, and accepts 256.0 as an integer.
        pass
    lenient_body = decode_leniently(body, schema)
    for name in lenient_body.unknown_fields:
        if name in REJECTED:
            raise BadRequestError(f"{name} is not supported: {REJECTED[name]}", param=name)
    if lenient_body.unknown_fields and unknown in ("refuse", "error"):
        raise _not_fields(lenient_body)
    if lenient_body.misspelt and unknown == "report":
        raise _misspelt(*lenient_body.misspelt)
    return lenient_body


def decode_leniently(body: bytes, schema: type[T]) -> LenientBody[T]:
    """Decode the body without its unknown fields, at any depth, in one pass.

    JSON has one kind of number, so 256.0 is accepted as an integer.
    Raises BadRequestError whose `param` is the path of the field.
    """
    if not body:
        raise BadRequestError("the request has no body: send a JSON object")
    raw: Any = None
    try:
        raw = _any_json(body)
        value = msgspec.convert(raw, lenient(schema))
    except msgspec.ValidationError as error:
        raise _named(error, schema, raw) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequestError(f"the body is not valid JSON: {_reason(error)}") from None
    found = list(itertools.islice(unknown_fields(raw, value), MAX_COMPARED_FIELDS))
    named = [one.path[:MAX_NAME_CHARS] for one in found[:MAX_NAMED_FIELDS]]
    return LenientBody(value, named, _first_misspelt(found))


def _first_misspelt(fields: list[UnknownField]) -> tuple[str, str] | None:
    for one in fields:
        if (meant := one.meant) is not None:
            return one.path[:MAX_NAME_CHARS], meant[:MAX_NAME_CHARS]
    return None


def _any_json(body: bytes) -> Any:
    """Decode the body without a schema; whole floats become integers if there are few numbers."""
    # Each float is a call into Python: a million would block all streams for half a second.
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
    """Return the text. Raises BadRequestError if it contains U+0000."""
    if "\0" in text:
        raise BadRequestError(f"{field} contains the character U+0000: remove it", param=field)
    return text


def _not_fields(body: LenientBody[Any]) -> BadRequestError:
    """The error for unknown fields; `param` is the first."""
    fields = body.unknown_fields
    is_one = len(fields) == 1
    hint = f" (did you mean {body.misspelt[1]}?)" if body.misspelt else ""
    return BadRequestError(
        f"{', '.join(fields)} {'is not a field' if is_one else 'are not fields'} of this"
        f" API{hint}: remove {'it' if is_one else 'them'}, or start the server with"
        " --unknown-fields report",
        param=fields[0],
    )


def _misspelt(path: str, meant: str) -> BadRequestError:
    return BadRequestError(f"{path} is not a field of this API: did you mean {meant}?", param=path)


def _named(
    error: msgspec.ValidationError, schema: type[msgspec.Struct], raw: Any
) -> BadRequestError:
    """The error in plain words, with the field's path as `param`, and what the field takes."""
    problem, path = _split(error)
    if missing := _MISSING.match(problem):
        field = f"{path}.{missing['field']}" if path else missing["field"]
        if misspelt := _misspelt_in(raw, path, missing["field"]):
            return _misspelt(misspelt, f"{field}, which is required")
        choice = choice_at(schema, raw, field)
        remedy = f": {choice.remedy}" if choice else ""
        return BadRequestError(f"{field} is required{remedy}", param=field)
    if not path:
        return BadRequestError(f"the body is invalid: {problem}")
    if choice := choice_at(schema, raw, path):
        return BadRequestError(f"{path} is {shown(choice.value)}: {choice.remedy}", param=path)
    return BadRequestError(f"{path}: {problem[:300]}", param=path)


def _misspelt_in(raw: Any, path: str, name: str) -> str | None:
    """The path of a field beside the missing one that looks like it, or None.

    path: of the object without the field.
    """
    if "[...]" in path:  # a key of any name, which the path leaves out
        return None
    for step in _STEP.finditer(path):
        raw = raw[int(step["index"])] if step["index"] else raw[step["name"]]
    keys = itertools.islice(raw, MAX_COMPARED_FIELDS) if isinstance(raw, dict) else ()
    key = next((key for key in keys if is_misspelt(key, name)), None)
    if key is None:
        return None
    return (f"{path}.{key}" if path else key)[:MAX_NAME_CHARS]


def _split(error: msgspec.ValidationError) -> tuple[str, str]:
    """msgspec's message without its path, and the path without its `$`.

    The message may quote the client, so only its end is taken as the path.
    """
    problem, at, path = str(error).rpartition(_AT)
    if not at or not path.endswith("`"):
        return str(error), ""
    return problem, path[:-1].removeprefix(".")


def without_bom(body: bytes) -> bytes:
    """The body without UTF-8's byte order mark. Raises BadRequestError for UTF-16 and UTF-32."""
    if body.startswith(codecs.BOM_UTF8):
        return body[len(codecs.BOM_UTF8) :]
    is_wide = body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    # JSON starts with an ASCII character: a zero byte beside it is half of a UTF-16 one.
    if is_wide or b"\0" in body[:2]:
        raise BadRequestError("the body is UTF-16 or UTF-32: send it in UTF-8")
    return body


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if "truncated" in str(error):
        return "it ends too early, or contains half of a surrogate pair"
    return str(error)[:200]
