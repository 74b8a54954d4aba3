"""Requests made at random from the API's document: fast, for runs of a hundred thousand.

Owns how values are drawn from a schema and how requests are then damaged. Schemathesis checks far
more of each answer, at 40 times the cost. A request depends on its seed alone.
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from support.pictures import encoded, picture

PICTURE_URL = "data:image/png;base64," + base64.b64encode(encoded(picture(4, 4))).decode()
# Texts that some field reads: pictures, forms, marks of the template, arguments of calls.
TEXTS = (
    "a", "hello", "", " ", "meta/llama-3.2-11b-vision-instruct", "user", "tool", "call_1", "auto",
    "é\u2028\x85", "\ud83d\ude00", "x" * 300, "<|eot_id|>", "<|image|>", "a\x00b", "{}", "(",
    "<|python_tag|>f.call(a=1)", '{"a": [1', '{"properties": {"a": {"pattern": "^\\\\d+$"}}}',
    "[a-z]{1,3}", "2024-01-01", "a[^\\s\\S]", "(?i)k+", 'root ::= "a" | "b"', "start: /b/ & /c/",
    "1", "-1", "1e999", PICTURE_URL, PICTURE_URL[:60], "data:text/plain;charset=utf-8,hi",
    "data:image/png;base64,", "http://example.com/a.png", "https://", "ftp://a", "/etc/passwd",
    f'<img src="{PICTURE_URL}"/> what?', "../..", "%00", "{{ 1 / 0 }}", "{% raise %}",
)  # fmt: skip
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**40, 1.5, -0.0, 1e308, "", [], {},
    [[]], [{}], {"": {}}, [None], ["a"] * 130, {"type": "object"}, {"type": ["string", "null"]},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    {"oneOf": [{"type": "integer"}, {"minimum": 3}]}, {"type": "array", "uniqueItems": True},
)  # fmt: skip
# A 504 is the right answer to a short one.
LEAST_TIMEOUT_S = 600
MAX_DEPTH = 12


@dataclass(slots=True)
class SampledRequest:
    """One request. body: None, or its bytes."""

    method: str
    path: str
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)


class RequestSampler:
    """Draws requests to every operation of an OpenAPI document."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._schemas = document["components"]["schemas"]
        self._operations = [
            (method.upper(), path, operation)
            for path, operations in document["paths"].items()
            for method, operation in operations.items()
            if method in ("get", "head", "post", "delete")
        ]
        self._with_body = [one for one in self._operations if "requestBody" in one[2]]
        self._examples = [
            example["value"]
            for _, _, operation in self._with_body
            for example in _media(operation).get("examples", {}).values()
        ]

    def request(self, seed: int) -> SampledRequest:
        """The request of this seed: nine of ten have a body."""
        rng = random.Random(seed)
        operations = self._with_body if rng.random() < 0.9 else self._operations
        method, path, operation = rng.choice(operations)
        for name in ("response_id", "name"):
            path = path.replace("{" + name + "}", rng.choice(("resp_1", "a/b", "%2F", "x" * 200)))
        if "requestBody" not in operation:
            return SampledRequest(method, path)
        body = self._body(rng, operation)
        for _ in range(rng.choice((0, 0, 0, 1, 1, 3))):
            body = self._damaged(rng, body)
        return _encoded(rng, SampledRequest(method, path), _with_long_time(body))

    def _body(self, rng: random.Random, operation: dict[str, Any]) -> Any:
        media = _media(operation)
        examples = [one["value"] for one in media.get("examples", {}).values()]
        drawn = _Draw(rng, self._schemas).value(media["schema"], 0)
        if not examples or not isinstance(drawn, dict) or rng.random() < 0.3:
            return drawn
        example = deepcopy(rng.choice(examples))
        # An example that is accepted, with some of the fields drawn.
        names = rng.sample(sorted(drawn), min(len(drawn), rng.randrange(4)))
        return example | {name: drawn[name] for name in names}

    def _damaged(self, rng: random.Random, body: Any) -> Any:
        """The body with one place changed."""
        places = list(_places(body))
        if not places:
            return deepcopy(rng.choice(HOSTILE))
        parent, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0:
            parent[key] = deepcopy(rng.choice(HOSTILE))
        elif kind == 1:
            parent[key] = rng.choice(TEXTS)
        elif kind == 2:
            parent[key] = [deepcopy(parent[key]) for _ in range(rng.choice((1, 2, 3, 130)))]
        elif kind == 3:
            inner = parent[key]
            for _ in range(rng.choice((1, 2, 70))):
                inner = {"items": inner}
            parent[key] = inner
        elif kind == 4 and isinstance(parent, dict):
            name = rng.choice((key[:-1], key + "s", "zzz", "", "é", "x_1", "n" * 80))
            parent[name] = parent.pop(key)
        else:
            same = [one[key] for one in self._examples if isinstance(key, str) and key in one]
            parent[key] = deepcopy(rng.choice(same or self._examples or HOSTILE))
        return body


class _Draw:
    """Values of a schema, most of them valid."""

    def __init__(self, rng: random.Random, schemas: dict[str, Any]) -> None:
        self._rng = rng
        self._schemas = schemas

    def value(self, schema: Any, depth: int) -> Any:
        rng = self._rng
        if not isinstance(schema, dict) or depth > MAX_DEPTH:
            return deepcopy(rng.choice(HOSTILE))
        if "$ref" in schema:
            return self.value(self._schemas[schema["$ref"].rpartition("/")[2]], depth)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return rng.choice(schema["enum"]) if rng.random() < 0.95 else rng.choice(TEXTS)
        for word in ("anyOf", "oneOf", "allOf"):
            # Beside properties they are rules between fields.
            if word in schema and "properties" not in schema:
                return self.value(rng.choice(schema[word]), depth)
        draw = {
            "object": self._object,
            "array": self._array,
            "string": lambda one, _: self._text(one),
            "integer": lambda one, _: round(self._number(one)),
            "number": lambda one, _: self._number(one),
            "boolean": lambda *_: rng.random() < 0.5,
            "null": lambda *_: None,
        }.get(schema.get("type", ""))
        return draw(schema, depth + 1) if draw else deepcopy(rng.choice(HOSTILE))

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        rng, properties = self._rng, schema.get("properties", {})
        share = min(1.0, 3 / max(1, len(properties)))
        names = [
            name
            for name in properties
            if name in schema.get("required", ()) or rng.random() < share
        ]
        drawn = {name: self.value(properties[name], depth) for name in names}
        more = schema.get("additionalProperties", False)
        if more is not False and rng.random() < 0.5:
            drawn[rng.choice(("1", "a", "300", "zz"))] = self.value(more, depth)
        return drawn

    def _array(self, schema: dict[str, Any], depth: int) -> list[Any]:
        num = schema.get("minItems", 0) + self._rng.choice((0, 1, 1, 2))
        return [self.value(schema.get("items"), depth) for _ in range(min(num, 4))]

    def _text(self, schema: dict[str, Any]) -> str:
        # Names and ids have a pattern.
        return self._rng.choice(TEXTS if "pattern" not in schema else ("f", "call_1", "a b"))

    def _number(self, schema: dict[str, Any]) -> float:
        least, most = schema.get("minimum", -(2**31)), schema.get("maximum", 2**31)
        least = schema.get("exclusiveMinimum", least)
        near = [least, least + 1, most, 0, 1, 2, 5, 0.5, least - 1, most + 1]
        inside = [one for one in near if least <= one <= most]
        return self._rng.choice(inside if self._rng.random() < 0.95 else near)


def _media(operation: dict[str, Any]) -> dict[str, Any]:
    media: dict[str, Any] = operation["requestBody"]["content"]["application/json"]
    return media


def _places(part: Any) -> Iterator[tuple[Any, Any]]:
    """Each (container, key) below a body."""
    if not isinstance(part, dict | list):
        return
    for key, inner in list(part.items() if isinstance(part, dict) else enumerate(part)):
        yield part, key
        yield from _places(inner)


def _with_long_time(body: Any) -> Any:
    if isinstance(body, dict) and isinstance(body.get("timeout_s"), int | float):
        body["timeout_s"] = LEAST_TIMEOUT_S + abs(body["timeout_s"])
    return body


def _encoded(rng: random.Random, request: SampledRequest, body: Any) -> SampledRequest:
    """The request with its body's bytes, one in twenty damaged."""
    text = json.dumps(body, ensure_ascii=rng.random() < 0.5)
    data = text.encode("utf-8", "surrogatepass")
    kinds = ("application/json", "application/json; charset=utf-8", "text/plain", "", "a/b; c")
    kind = kinds[0] if rng.random() < 0.97 else rng.choice(kinds)
    if rng.random() < 0.05:
        place = rng.randrange(len(data) + 1)
        data = rng.choice(
            (
                data[:place],
                data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :],
                data[:place] + data[place // 2 :],
                b"\xef\xbb\xbf" + data,
                text.encode("utf-16", "surrogatepass"),
                b"",
            )
        )
    request.body, request.headers = data, {"content-type": kind}
    return request
