"""Lenient twins of the schemas, which accept unknown fields, and the names of those fields.

Owns both halves of one pass: `lenient` builds a twin of a struct, and `unknown_fields` compares
what a client sent with what the twin kept. Knows no schema.
"""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import msgspec

T = TypeVar("T", bound=msgspec.Struct)


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


def unknown_fields(raw: Any, value: Any, path: str = "") -> Iterator[str]:
    """The paths of all fields of `raw` that `value` does not have, in the order of `raw`.

    raw: decoded JSON without a schema; value: what `msgspec.convert` made of it. Values that have
    no schema are the same object in both, so the search does not enter them.
    """
    if raw is value:
        return
    if isinstance(value, msgspec.Struct):
        names = _names_by_key(type(value))
        for key, inner in raw.items():
            place = f"{path}.{key}" if path else key
            if key not in names:
                yield place
            elif (name := names[key]) is not None:
                yield from unknown_fields(inner, getattr(value, name), place)
    elif isinstance(value, list):
        for index, (inner, kept) in enumerate(zip(raw, value, strict=True)):
            if inner is not kept:
                yield from unknown_fields(inner, kept, f"{path}[{index}]")
    elif isinstance(value, dict):
        for key, inner in raw.items():
            yield from unknown_fields(inner, value[key], f"{path}.{key}")


@functools.cache
def _names_by_key(schema: type[msgspec.Struct]) -> dict[str, str | None]:
    """The attribute for each JSON key of a struct; None for its tag."""
    names: dict[str, str | None] = {
        field.encode_name: field.name for field in msgspec.structs.fields(schema)
    }
    if (tag_field := schema.__struct_config__.tag_field) is not None:
        names[tag_field] = None
    return names
