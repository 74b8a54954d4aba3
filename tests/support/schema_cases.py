"""Bad bodies made from a schema: each field missing, null, of a wrong type or value, unknown.

Walks msgspec's own description of the types. Knows no endpoint and no server.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from msgspec import inspect

UNKNOWN = "no_such_field"
# One value of each kind of JSON, none of which any literal or pattern of ours is.
KINDS: dict[str, Any] = {
    "bool": True,
    "int": 10**6,
    "float": 1.5,
    "str": "?!",
    "list": [],
    "dict": {},
}
Samples = Mapping[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Case:
    """A body, and the field that is wrong in it.

    kind: missing, null, type, range, choice or unknown. is_neutral: null is taken there.
    choices: the values that the field may have, if it is one of a few.
    """

    kind: str
    field: str
    body: Any
    is_neutral: bool = False
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a struct stands: its path, and a body in which it does."""

    path: str
    body: Any
    steps: tuple[str | int, ...] = ()

    def holding(self, value: Any) -> Any:
        """The body with this value in this place."""
        if not self.steps:
            return value
        body = copy.deepcopy(self.body)
        inner = body
        for step in self.steps[:-1]:
            inner = inner[step]
        inner[self.steps[-1]] = value
        return body

    def inside(self, step: str | int, value: Any) -> _Place:
        """The place one step down; value: what this place holds then."""
        name = f"[{step}]" if isinstance(step, int) else f".{step}" if self.path else step
        return _Place(self.path + name, self.holding(value), (*self.steps, step))


def cases_of(schema: type, base: dict[str, Any], samples: Samples) -> Iterator[Case]:
    """Every case of a body's schema. base: a good body; samples: good structs by their names."""
    info = inspect.type_info(schema)
    assert isinstance(info, inspect.StructType), "a body is an object"
    yield from _of_struct(info, base, _Place("", base), samples)


def sample_of(info: inspect.Type, samples: Samples) -> Any:
    """A small value of the type."""
    info = _plain(info)
    if isinstance(info, inspect.StructType):
        if info.cls.__name__ in samples:
            return copy.deepcopy(samples[info.cls.__name__])
        fields = {
            one.encode_name: sample_of(one.type, samples) for one in info.fields if one.required
        }
        return ({info.tag_field: info.tag} if info.tag_field else {}) | fields
    if isinstance(info, inspect.UnionType):
        return sample_of(info.types[0], samples)
    if isinstance(info, inspect.ListType):
        return [sample_of(info.item_type, samples)] if info.min_length else []
    if isinstance(info, inspect.LiteralType):
        return info.values[0]
    values = {inspect.AnyType: {}, inspect.StrType: "a", inspect.IntType: 1, inspect.FloatType: 1.0}
    others = {inspect.BoolType: True, inspect.DictType: {}, inspect.NoneType: None}
    return (values | others)[type(info)]


def _of_struct(
    info: inspect.StructType, value: dict[str, Any], place: _Place, samples: Samples
) -> Iterator[Case]:
    unknown = place.inside(UNKNOWN, value)
    yield Case("unknown", unknown.path, unknown.holding(1))
    for field in info.fields:
        inner = place.inside(field.encode_name, value)
        if field.required:
            rest = {key: one for key, one in value.items() if key != field.encode_name}
            yield Case("missing", inner.path, place.holding(rest))
        yield from _of_value(field.type, inner, samples)


def _of_value(info: inspect.Type, place: _Place, samples: Samples) -> Iterator[Case]:
    members = [_plain(one) for one in _members(info)]
    kinds = {_kind_of(member) for member in members}
    if "any" in kinds:
        return
    yield Case("null", place.path, place.holding(None), is_neutral="null" in kinds)
    for kind, wrong in KINDS.items():
        if kind not in kinds and not (kind == "int" and "float" in kinds):
            yield Case("type", place.path, place.holding(wrong))
    for member in members:
        for value in _out_of_range(member, samples):
            yield Case("range", place.path, place.holding(value))
        yield from _inside(member, place, samples)
    literals = [one for one in members if isinstance(one, inspect.LiteralType)]
    if literals and not any(isinstance(one, inspect.StrType) for one in members):
        values = tuple(str(value) for one in literals for value in one.values)
        yield Case("choice", place.path, place.holding(KINDS["str"]), choices=values)
    yield from _wrong_tags(members, place, samples)


def _wrong_tags(members: Iterable[inspect.Type], place: _Place, samples: Samples) -> Iterator[Case]:
    """A body with a wrong tag, if there is a choice of objects by their tags."""
    structs = [one for one in members if isinstance(one, inspect.StructType) and one.tag_field]
    if len(structs) < 2:
        return
    tag_field = structs[0].tag_field
    assert tag_field is not None
    tags = tuple(str(one.tag) for one in structs)
    wrong = sample_of(structs[0], samples) | {tag_field: KINDS["str"]}
    inner = place.inside(tag_field, wrong)
    yield Case("choice", inner.path, place.holding(wrong), choices=tags)
    without = {key: value for key, value in wrong.items() if key != tag_field}
    yield Case("choice", inner.path, place.holding(without), choices=tags)


def _inside(member: inspect.Type, place: _Place, samples: Samples) -> Iterator[Case]:
    if isinstance(member, inspect.StructType):
        yield from _of_struct(member, sample_of(member, samples), place, samples)
    elif isinstance(member, inspect.ListType):
        items = [_plain(one) for one in _members(member.item_type)]
        yield from _wrong_tags(items, place.inside(0, [{}]), samples)
        for one in items:
            item = place.inside(0, [sample_of(one, samples)])
            if isinstance(one, inspect.StructType):
                yield from _of_struct(one, sample_of(one, samples), item, samples)
            else:
                for value in _out_of_range(one, samples):
                    yield Case("range", item.path, item.holding(value))
                yield from _inside(one, item, samples)


def _out_of_range(info: inspect.Type, samples: Samples) -> Iterator[Any]:
    """Values of the right type just outside what the type takes."""
    if isinstance(info, inspect.IntType | inspect.FloatType):
        step = 1 if isinstance(info, inspect.IntType) else 0.01
        if info.ge is not None:
            yield info.ge - step
        if info.le is not None:
            yield info.le + step
        yield from [bound for bound in (info.gt, info.lt) if bound is not None]
        yield 10**400
    elif isinstance(info, inspect.StrType):
        if info.min_length:
            yield "a" * (info.min_length - 1)
        if info.max_length is not None:
            yield "a" * (info.max_length + 1)
        if info.pattern is not None:
            yield from ("", "?!")
    elif isinstance(info, inspect.LiteralType):
        yield KINDS["str"]
    elif isinstance(info, inspect.ListType):
        item = sample_of(info.item_type, samples)
        if info.min_length:
            yield [item] * (info.min_length - 1)
        if info.max_length is not None:
            yield [item] * (info.max_length + 1)
    elif isinstance(info, inspect.DictType) and info.max_length is not None:
        value = sample_of(info.value_type, samples)
        yield {str(number): value for number in range(info.max_length + 1)}


def _plain(info: inspect.Type) -> inspect.Type:
    while isinstance(info, inspect.Metadata):
        info = info.type
    return info


def _members(info: inspect.Type) -> tuple[inspect.Type, ...]:
    info = _plain(info)
    return info.types if isinstance(info, inspect.UnionType) else (info,)


def _kind_of(info: inspect.Type) -> str:
    kinds = {
        inspect.AnyType: "any", inspect.NoneType: "null", inspect.BoolType: "bool",
        inspect.IntType: "int", inspect.FloatType: "float", inspect.StrType: "str",
        inspect.LiteralType: "str", inspect.ListType: "list", inspect.DictType: "dict",
        inspect.StructType: "dict",
    }  # fmt: skip
    return kinds[type(info)]
