"""A client's JSON schema in the keywords that grammars can obey.

Owns which keywords change nothing (annotations, neutral values) and which are dropped and
reported. Pydantic and zod write them all. Knows no API field and no grammar.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .regex_dialect import with_ascii_classes

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
_OPEN: tuple[Any, ...] = (True, {})
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
    uniqueItems, which no grammar can enforce.
    """
    dropped: list[str] = []
    return _plain(schema, path, dropped), dropped


def _plain(schema: dict[str, Any], path: str, dropped: list[str]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if _is_neutral(key, value, schema):
            continue
        if key == "uniqueItems" and value is True:
            dropped.append(f"{path}.{key}")
            continue
        kept[key] = _inner(key, value, f"{path}.{key}", dropped)
    return kept


def _is_neutral(key: str, value: Any, schema: dict[str, Any]) -> bool:
    if value is None:
        return key not in _VALUES
    if key == "format":
        return value not in FORMATS
    if key in ("then", "else"):
        return schema.get("if") is None
    if key == "if":
        return schema.get("then") is None and schema.get("else") is None
    if key == "contains":
        return schema.get("minContains") == 0 and schema.get("maxContains") is None
    if key == "minContains" and schema.get("contains") is None:
        return True
    return any(type(one) is type(value) and one == value for one in _NEUTRAL.get(key, ()))


def _inner(key: str, value: Any, path: str, dropped: list[str]) -> Any:
    """The value of a keyword, its schemas plain."""
    if key == "pattern" and isinstance(value, str):
        return with_ascii_classes(value)
    if key == "patternProperties" and isinstance(value, dict):
        value = {with_ascii_classes(pattern): one for pattern, one in value.items()}
    if key in _SCHEMAS_BY_NAME and isinstance(value, dict):
        return dict(_named(value, path, dropped))
    if isinstance(value, list) and key in (*_LISTS_OF_SCHEMAS, "items"):
        return [
            _plain(one, f"{path}[{i}]", dropped) if isinstance(one, dict) else one
            for i, one in enumerate(value)
        ]
    if key in _SCHEMAS and isinstance(value, dict):
        return _plain(value, path, dropped)
    return value


def _named(schemas: dict[str, Any], path: str, dropped: list[str]) -> Iterator[tuple[str, Any]]:
    for name, one in schemas.items():
        yield name, _plain(one, f"{path}.{name}", dropped) if isinstance(one, dict) else one
