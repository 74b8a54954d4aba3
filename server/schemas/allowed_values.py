"""The values that a field may have, for the errors about it: of an enum, or the types of a part.

Follows a path of msgspec's through the types of a schema. A schema may list `notes`: for a field
and a wrong value of it, what to do instead. Knows no schema.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec

# What to do instead, by the field's name and its wrong value; ANY_VALUE stands for every value.
Notes = Mapping[str, Mapping[str, str]]
ANY_VALUE = ""
# Where a part with an image may not be, by the names that clients give to its type.
IMAGES_OF_USERS: Notes = {
    "type": dict.fromkeys(
        ("image", "image_url", "input_image"), "Images belong in messages of the role user"
    )
}

# msgspec evaluates the annotations anew in each call, for milliseconds.
_fields_of = functools.cache(msgspec.structs.fields)
_STEP = re.compile(r"\[(?P<index>[0-9]+|\.\.\.)\]|\.?(?P<name>[^.\[\]]+)")
_KINDS = {list: "a list", dict: "an object"}
MAX_SHOWN_CHARS = 64


@dataclass(slots=True)
class _Place:
    """Where a path has led: the types that a value may have there, the value, and all notes."""

    types: list[Any]
    value: Any
    tags: list[str] = field(default_factory=list)
    notes: list[Notes] = field(default_factory=list)

    def members(self) -> Iterator[Any]:
        for declared in self.types:
            yield from _members(declared)


@dataclass(slots=True, frozen=True)
class Choice:
    """A place where only some values are allowed. value: what stands there; remedy: what may."""

    value: Any
    remedy: str


def choice_at(schema: type[msgspec.Struct], raw: Any, path: str) -> Choice | None:
    """The choice at a path; None if the place takes any text, or nothing of an enum.

    raw: the body as JSON has it; path: such as `messages[0].content[1].type`.
    """
    place = _Place([schema], raw)
    name = ""
    for step in _STEP.finditer(path):
        name = step["name"] or ""
        place = _field(place, name) if name else _item(place, step["index"])
    members = list(place.members())
    literals = [value for one in members if get_origin(one) is Literal for value in get_args(one)]
    values = [*place.tags, *literals]
    if not values or str in members:
        return None
    others = [kind for kind in dict.fromkeys(map(_kind_of, members)) if kind]
    remedy = f"send {or_list([*map(quoted, values), *others])}"
    note = _note(place, name)
    return Choice(place.value, f"{remedy}. {note}" if note else remedy)


def shown(value: Any) -> str:
    """A client's value in an error: a text as JSON, cut; of lists and objects the kind."""
    if isinstance(value, list | dict):
        return _KINDS[type(value)]
    text = quoted(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}..."


def quoted(value: Any) -> str:
    """A value as a client writes it."""
    return msgspec.json.encode(value).decode()


def or_list(words: Sequence[str]) -> str:
    """`a, b or c`."""
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _field(place: _Place, name: str) -> _Place:
    structs = [one for one in place.members() if _is_struct(one)]
    value = place.value if isinstance(place.value, dict) else {}
    tags = [_tag_of(one) for one in structs if one.__struct_config__.tag_field == name]
    known = [one for one in structs if _is_meant(one, value)]
    fields = [
        one.type
        for struct in known or structs
        for one in _fields_of(struct)
        if one.encode_name == name
    ]
    notes: list[Notes] = [getattr(struct, "notes", {}) for struct in known]
    return _Place(fields, value.get(name), [] if fields else tags, [*place.notes, *notes])


def _item(place: _Place, index: str) -> _Place:
    """One step into a list, or into an object of any names (`...`)."""
    items = []
    for one in place.members():
        origin, arguments = get_origin(one), get_args(one)
        if origin is list:
            items.append(arguments[0])
        elif origin is dict and index == "...":
            items.append(arguments[1])
    is_list = isinstance(place.value, list) and index.isdigit()
    return _Place(items, place.value[int(index)] if is_list else None, [], place.notes)


def _note(place: _Place, name: str) -> str:
    """The innermost note for this field's value."""
    value = place.value if isinstance(place.value, str) else ANY_VALUE
    for notes in reversed(place.notes):
        by_value = notes.get(name, {})
        if found := by_value.get(value, by_value.get(ANY_VALUE, "")):
            return found
    return ""


def _members(declared: Any) -> Iterator[Any]:
    origin = get_origin(declared)
    if origin is Annotated:
        yield from _members(get_args(declared)[0])
    elif origin in (Union, types.UnionType):
        for one in get_args(declared):
            yield from _members(one)
    else:
        yield declared


def _is_struct(declared: Any) -> bool:
    return isinstance(declared, type) and issubclass(declared, msgspec.Struct)


def _tag_of(struct: type[msgspec.Struct]) -> str:
    return str(struct.__struct_config__.tag)


def _is_meant(struct: type[msgspec.Struct], value: Mapping[str, Any]) -> bool:
    """True if the struct has no tag, or the value has it."""
    config = struct.__struct_config__
    return config.tag_field is None or value.get(config.tag_field) == config.tag


def _kind_of(declared: Any) -> str:
    if _is_struct(declared):
        return "an object"
    return _KINDS.get(get_origin(declared) or declared, "")
