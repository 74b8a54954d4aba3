"""Lenient twins of the schemas, which accept unknown fields, and the names of those fields.

Owns both halves of one pass: `lenient` builds a twin of a struct, and `unknown_fields` compares
what a client sent with what the twin kept. A schema lists as `foreign` the fields of other
servers. Also decides which unknown name is a misspelt known one. Knows no schema.
"""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import msgspec

from .foreign import is_neutral

T = TypeVar("T", bound=msgspec.Struct)

# Two edits turn one short name into another: `data` into `meta`.
MIN_LENGTH_OF_EDITS = {1: 4, 2: 7}
MAX_LENGTH = 64
# Names of other APIs that are one or two edits from a name here, and mean something else.
OTHER_NAMES = frozenset({"min_k", "mode", "models", "tags", "task", "top_a", "top_h", "top_n"})


@dataclass(slots=True, frozen=True)
class UnknownField:
    """A field that a schema does not have. name: its last step; schema: where it was sent."""

    path: str
    name: str
    schema: type[msgspec.Struct]

    @property
    def meant(self) -> str | None:
        """The path of the known field that this one misspells, or None."""
        known = meant_name(self.name, self.schema)
        return None if known is None else self.path.removesuffix(self.name) + known


@functools.cache
def lenient(schema: type[T]) -> type[T]:
    """A subclass of the schema that ignores unknown fields, at every depth."""
    fields: list[tuple[str, Any, Any]] = []
    for field in msgspec.structs.fields(schema):
        options: dict[str, Any] = {
            "default": field.default,
            "default_factory": field.default_factory,
            "name": field.encode_name,
        }
        fields.append((field.name, _lenient_type(field.type), msgspec.field(**options)))
    config = schema.__struct_config__
    twin: Any = msgspec.defstruct(
        schema.__name__,
        fields,
        bases=(schema,),
        forbid_unknown_fields=False,
        kw_only=True,
        tag=config.tag,
        tag_field=config.tag_field,
    )
    return twin


def _lenient_type(declared: Any) -> Any:
    """The type with every struct in it replaced by its lenient twin."""
    if isinstance(declared, type) and issubclass(declared, msgspec.Struct):
        return lenient(declared)
    origin, arguments = get_origin(declared), get_args(declared)
    if origin is Annotated:
        return Annotated[(_lenient_type(arguments[0]), *declared.__metadata__)]
    if origin in (Union, types.UnionType):
        return functools.reduce(operator.or_, map(_lenient_type, arguments))
    if origin in (list, dict):
        return origin[tuple(map(_lenient_type, arguments))]
    return declared


def unknown_fields(raw: Any, value: Any, path: str = "") -> Iterator[UnknownField]:
    """All fields of `raw` that `value` does not have, in the order of `raw`; null is no field.

    raw: decoded JSON without a schema; value: what `msgspec.convert` made of it. Values that have
    no schema are the same object in both, so the search does not enter them.
    """
    if raw is value:
        return
    if isinstance(value, msgspec.Struct):
        names = _names_by_key(type(value))
        for key, inner in raw.items():
            place = f"{path}.{key}" if path else key
            if key in names:
                if (name := names[key]) is not None:
                    yield from unknown_fields(inner, getattr(value, name), place)
            elif not _is_absent(key, inner, type(value)):
                yield UnknownField(place, key, type(value))
    elif isinstance(value, list):
        for index, (inner, kept) in enumerate(zip(raw, value, strict=True)):
            if inner is not kept:
                yield from unknown_fields(inner, kept, f"{path}[{index}]")
    elif isinstance(value, dict):
        for key, inner in raw.items():
            yield from unknown_fields(inner, value[key], f"{path}.{key}")


def _is_absent(name: str, value: Any, schema: type[msgspec.Struct]) -> bool:
    """True if an unknown field changes nothing: it is null, or foreign and neutral."""
    return value is None or is_neutral(value, _foreign_of(schema).get(name, ()))


def _foreign_of(schema: type[msgspec.Struct]) -> Mapping[str, tuple[Any, ...]]:
    foreign: Mapping[str, tuple[Any, ...]] = getattr(schema, "foreign", {})
    return foreign


@functools.lru_cache(maxsize=4096)
def meant_name(name: str, schema: type[msgspec.Struct]) -> str | None:
    """The schema's name that is nearest to this unknown one, at one or two edits; or None.

    An edit adds, drops or changes a character, or swaps two neighbours.
    """
    if len(name) > MAX_LENGTH or name in OTHER_NAMES or name in _foreign_of(schema):
        return None
    for num_edits in MIN_LENGTH_OF_EDITS:
        for known in _names_by_key(schema):
            if _is_near(name, known, num_edits):
                return known
    return None


def is_misspelt(name: str, known: str) -> bool:
    """True if a name is one or two edits from a known one."""
    return len(name) <= MAX_LENGTH and any(
        _is_near(name, known, num_edits) for num_edits in MIN_LENGTH_OF_EDITS
    )


def _is_near(name: str, known: str, num_edits: int) -> bool:
    is_long = min(len(name), len(known)) >= MIN_LENGTH_OF_EDITS[num_edits]
    return is_long and is_within(name.lower(), known, num_edits)


def is_within(one: str, other: str, num_edits: int) -> bool:
    """True if that many edits, or fewer, turn one text into the other."""
    if abs(len(one) - len(other)) > num_edits:
        return False
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    one, other = one[same:], other[same:]
    if not one or not other:
        return True
    if num_edits == 0:
        return False
    is_swapped = len(one) > 1 and one[:2] == other[1::-1]
    return (
        is_within(one[1:], other[1:], num_edits - 1)
        or is_within(one[1:], other, num_edits - 1)
        or is_within(one, other[1:], num_edits - 1)
        or (is_swapped and is_within(one[2:], other[2:], num_edits - 1))
    )


@functools.cache
def _names_by_key(schema: type[msgspec.Struct]) -> dict[str, str | None]:
    """The attribute for each JSON key of a struct; None for its tag."""
    names: dict[str, str | None] = {
        field.encode_name: field.name for field in msgspec.structs.fields(schema)
    }
    if (tag_field := schema.__struct_config__.tag_field) is not None:
        names[tag_field] = None
    return names
