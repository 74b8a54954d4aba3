"""A client's JSON schema in the keywords that grammars can obey.

Owns which keywords change nothing (annotations, neutral values) and which are dropped and
reported. Pydantic and zod write them all. Knows no API field and no grammar.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import msgspec

from .look_around import without_look_around
from .regex_dialect import with_ascii_classes

# A grammar with more would be too large anyway.
MAX_COPIED_BYTES = 65_536
# Formats that grammars obey; any other one is an annotation.
FORMATS = frozenset(
    {"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"}
)
# Where a null is a value and no absent keyword.
_VALUES = frozenset({"const", "default", "example", "examples"})
_SCHEMAS_BY_NAME = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
_LISTS_OF_SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SCHEMAS = (
    *("additionalItems", "additionalProperties", "contains", "else", "if", "items", "not"),
    *("propertyNames", "then", "unevaluatedItems", "unevaluatedProperties"),
)
_OF_A_PATTERN = {"description", "pattern", "title", "type"}
_OPEN: tuple[Any, ...] = (True, {})
_DIRECTIONS = {"minimum": -1, "exclusiveMinimum": -1, "maximum": 1, "exclusiveMaximum": 1}
# From here on no grammar has the bound; the second is that of every double.
_FAR, _FARTHEST = 10**18, sys.float_info.max
# Keywords that grammars do not know, at the values at which they change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "dependencies": ({},),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "minContains": (0, 1),
    "minProperties": (0,),
    "propertyNames": (*_OPEN, {"type": "string"}),
    "unevaluatedItems": _OPEN,
    "unevaluatedProperties": _OPEN,
    "uniqueItems": (False,),
}


def plain_schema(schema: dict[str, Any], path: str = "schema") -> tuple[dict[str, Any], list[str]]:
    """The schema without what changes nothing, and the paths of keywords that were dropped.

    path: where the schema stands. It must not nest too deeply (`json_depth`). Dropped:
    uniqueItems, look-around of patterns, bounds of 1e18 and more, and propertyNames that list no
    names: no grammar can enforce them.
    """
    reader = _Reader(schema)
    return reader.plain(schema, path), reader.dropped


@dataclass(slots=True)
class _Reader:
    """Goes through one schema.

    root: where `$ref` starts. dropped: paths of dropped keywords. num_bytes: of schemas that
    were copied to the names of dictionaries.
    """

    root: dict[str, Any]
    dropped: list[str] = field(default_factory=list)
    num_bytes: int = 0

    def plain(self, schema: dict[str, Any], path: str) -> dict[str, Any]:
        """A schema within the root, without what changes nothing."""
        kept: dict[str, Any] = {}
        for key, value in schema.items():
            if _is_neutral(key, value, schema):
                continue
            if (key == "uniqueItems" and value is True) or _is_far(key, value):
                self.dropped.append(f"{path}.{key}")
                continue
            kept[key] = self._inner(key, value, f"{path}.{key}")
        if isinstance(kept.get("pattern"), str):
            self._split_pattern(kept, f"{path}.pattern")
        if isinstance(kept.get("propertyNames"), dict):
            self._name_properties(kept, f"{path}.propertyNames")
        return kept

    def _inner(self, key: str, value: Any, path: str) -> Any:
        """The value of a keyword, its schemas plain."""
        if key == "patternProperties" and isinstance(value, dict):
            value = {self._plain_key(pattern, path): one for pattern, one in value.items()}
        if key in _SCHEMAS_BY_NAME and isinstance(value, dict):
            return {name: self._schema(one, f"{path}.{name}") for name, one in value.items()}
        if isinstance(value, list) and key in (*_LISTS_OF_SCHEMAS, "items"):
            return [self._schema(one, f"{path}[{i}]") for i, one in enumerate(value)]
        if key in _SCHEMAS:
            return self._schema(value, path)
        return value

    def _schema(self, schema: Any, path: str) -> Any:
        """A schema below the root. One that nothing fits, as zod writes `never`, is false."""
        if not isinstance(schema, dict):
            return schema
        is_never = any(schema.get("not") == one for one in _OPEN)
        return False if is_never else self.plain(schema, path)

    def _split_pattern(self, kept: dict[str, Any], path: str) -> None:
        """Put look-aheads at the start of a pattern beside it, and leave out other look-around."""
        found = without_look_around(kept["pattern"])
        kept["pattern"] = with_ascii_classes(found.pattern)
        if found.others and isinstance(kept.get("allOf", []), list):
            others = [{"pattern": with_ascii_classes(other)} for other in found.others]
            kept["allOf"] = [*kept.get("allOf", []), *others]
        if found.is_weaker:
            self.dropped.append(path)

    def _plain_key(self, pattern: str, path: str) -> str:
        found = without_look_around(pattern)
        if found.others or found.is_weaker:
            self.dropped.append(f"{path}.{pattern}")
        return with_ascii_classes(found.pattern)

    def _name_properties(self, kept: dict[str, Any], path: str) -> None:
        """Write the names that propertyNames lists as properties, or its pattern as theirs.

        So pydantic and zod write a dictionary whose keys are an enum.
        """
        names = self._target(kept.pop("propertyNames"))
        more = kept.get("additionalProperties", True)
        listed = [names["const"]] if "const" in names else names.get("enum")
        is_alone = not kept.get("properties") and not kept.get("patternProperties")
        if is_alone and isinstance(listed, list) and self._has_room(len(listed), more):
            kept["properties"] = {name: more for name in listed if isinstance(name, str)}
            kept["additionalProperties"] = False
        elif is_alone and "pattern" in names and set(names) <= _OF_A_PATTERN:
            kept["patternProperties"] = {self._plain_key(names["pattern"], path): more}
            kept["additionalProperties"] = False
        else:
            self.dropped.append(path)

    def _has_room(self, num_names: int, more: Any) -> bool:
        """Count that many copies of a schema; whether all of them fit."""
        self.num_bytes += num_names * len(msgspec.json.encode(more))
        return self.num_bytes <= MAX_COPIED_BYTES

    def _target(self, schema: dict[str, Any]) -> dict[str, Any]:
        """The schema that a `$ref` into the root points to; else the schema itself."""
        reference = schema.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return schema
        found: Any = self.root
        for step in reference[2:].split("/"):
            found = found.get(step) if isinstance(found, dict) else None
        return found if isinstance(found, dict) else schema


def _is_far(key: str, value: Any) -> bool:
    """True for a bound of numbers that is too large for a grammar, and that hardly any reaches."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and value * _DIRECTIONS.get(key, 0) >= _FAR


def _is_neutral(key: str, value: Any, schema: dict[str, Any]) -> bool:
    if value is None:
        return key not in _VALUES
    if key == "format":
        return value not in FORMATS
    if key in _DIRECTIONS:
        return _is_far(key, value) and abs(value) >= _FARTHEST
    if key in ("then", "else"):
        return schema.get("if") is None
    if key == "if":
        return schema.get("then") is None and schema.get("else") is None
    if key == "contains":
        return schema.get("minContains") == 0 and schema.get("maxContains") is None
    if key == "minContains" and schema.get("contains") is None:
        return True
    return any(type(one) is type(value) and one == value for one in _NEUTRAL.get(key, ()))
