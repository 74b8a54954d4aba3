"""The API's document: OpenAPI 3.1, made from what the routes declare.

Owns its structure, and which settings it shows: the model's names, whether keys are required, how
unknown fields are handled. Knows no endpoint. Schemas come from the types that validate requests
and that type checkers check answers against.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from ..errors import ErrorBody, FrameError
from ..schemas.decoding import SERVED_MODEL
from ..settings import ServerSettings
from .endpoint import EVENTS, Endpoint, Reply

REFERENCE = "#/components/schemas/"
KEY_SCHEME = "key"

# Error answers of any route beside its own replies.
REFUSALS = {
    400: "The request is invalid; `param` names the field.",
    401: "No API key, or a wrong one.",
    404: "The model or the path does not exist.",
    408: "The request did not arrive in time.",
    413: "The body is too large.",
    414: "The path and its query are too long.",
    415: "The body is compressed.",
    429: "The queue is full. Retry after the seconds in Retry-After.",
    431: "The request's head is too large.",
    500: "The server or a model step failed.",
    503: "The engine is not running, or is loading its model.",
    504: "The request timed out before its answer was complete.",
}
OF_EVERY_ROUTE = (400, 408, 414, 431, 500)
OF_BODIES = (413, 415)

_PARAMETER = re.compile(r"<(\w+)(?::\w+)?>")


def document(
    endpoints: Sequence[Endpoint], settings: ServerSettings, version: str, open_paths: Iterable[str]
) -> dict[str, Any]:
    """The document of a server with these endpoints and settings.

    open_paths: paths that never require a key.
    """
    schemas = Schemas(endpoints, settings)
    content: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": _info(version),
        "paths": _paths(endpoints, schemas, settings, frozenset(open_paths)),
        "components": {
            "schemas": schemas.components,
            "responses": {_refusal_name(status): _refusal(status) for status in REFUSALS},
            "headers": _HEADERS,
        },
        "tags": [{"name": tag} for tag in dict.fromkeys(one.tag for one in endpoints)],
    }
    if settings.needs_key:
        scheme = {"type": "http", "scheme": "bearer", "description": "One of the server's keys."}
        content["components"]["securitySchemes"] = {KEY_SCHEME: scheme}
        content["security"] = [{KEY_SCHEME: []}]
    return content


class Schemas:
    """The JSON schemas of all types that the endpoints name."""

    def __init__(self, endpoints: Sequence[Endpoint], settings: ServerSettings) -> None:
        bodies = [one.body for one in endpoints if one.body is not None]
        replies = [reply.type for one in endpoints for reply in one.replies]
        types = [*bodies, *replies, ErrorBody, FrameError]
        schemas, self.components = msgspec.json.schema_components(
            types, ref_template=f"{REFERENCE}{{name}}"
        )
        self._by_type = dict(zip(map(id, types), schemas, strict=True))
        seen: set[type] = set()
        for body in bodies:
            self._add_rules(msgspec.inspect.type_info(body), seen)
        for part in _parts(self.components):
            if isinstance(part.get("description"), str):
                part["description"] = inspect.cleandoc(part["description"])
            if part.get("title") == SERVED_MODEL:
                part |= _model_names(settings)
            if isinstance(part.get("pattern"), str):
                # Python's end of a text, in JSON Schema's notation.
                part["pattern"] = part["pattern"].replace(r"\Z", "$")
        if settings.unknown_fields in ("report", "ignore"):
            self._open(self.of(body) for body in bodies)

    def of(self, one: Any) -> dict[str, Any]:
        """The schema of one of these types, usually a reference."""
        return self._by_type[id(one)]

    def _add_rules(self, info: Any, seen: set[type]) -> None:
        """Add the constraints between fields of a body's structs to their schemas, once each."""
        if isinstance(info, msgspec.inspect.StructType):
            if info.cls in seen:
                return
            seen.add(info.cls)
            rules = vars(info.cls).get("schema_rules", {})
            component = self.components[info.cls.__name__]
            assert not rules.keys() & component.keys(), "rules replace keys of the type's schema"
            component |= rules
        for inner in _inner_types(info):
            self._add_rules(inner, seen)

    def _open(self, schemas: Iterable[dict[str, Any]]) -> None:
        """Allow unknown fields in these schemas and in all that they refer to."""
        seen: set[str] = set()
        waiting = list(schemas)
        while waiting:
            for part in _parts(waiting.pop()):
                if part.get("additionalProperties") is False:
                    del part["additionalProperties"]
                name = part.get("$ref", "").removeprefix(REFERENCE)
                if name and name not in seen:
                    seen.add(name)
                    waiting.append(self.components[name])


def _model_names(settings: ServerSettings) -> dict[str, Any]:
    """Which names a request's model may have; any if adapters come and go."""
    if settings.adapters.may_change:
        return {"description": "A name that /v1/models lists."}
    adapters = [adapter.name for adapter in settings.adapters.at_start]
    return {"enum": [*settings.served_model_names, *adapters]}


_HEADERS = {
    "X-Request-Id": {
        "description": "The request's X-Request-Id if it is valid, else a new id.",
        "schema": {"type": "string"},
    },
    "X-Ignored-Fields": {
        "description": "Fields of the request that the server does not know and dropped: the first"
        " 20, as paths, percent-encoded and separated by commas.",
        "schema": {"type": "string"},
    },
    "X-Replica": {
        "description": "The server that computed, by its --replica-name, and the number of its"
        " engine if it has several.",
        "schema": {"type": "string"},
    },
    "X-Image-Digests": {
        "description": "A digest of each image of the request, the first 20, separated by commas."
        " Equal files have equal digests.",
        "schema": {"type": "string"},
    },
    "Retry-After": {
        "description": "Seconds to wait before a retry.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "WWW-Authenticate": {"description": "Always Bearer.", "schema": {"type": "string"}},
}
_HEADERS_OF_STATUS = {
    200: ("X-Ignored-Fields", "X-Replica", "X-Image-Digests"),
    401: ("WWW-Authenticate",),
    429: ("Retry-After",),
    503: ("Retry-After",),
}


def _info(version: str) -> dict[str, Any]:
    return {
        "title": "vlmserve",
        "version": version,
        "description": "Llama-3.2-Vision behind the APIs of OpenAI, Anthropic and Llama Stack.",
        "license": {"name": "Apache 2.0", "identifier": "Apache-2.0"},
    }


def _paths(
    endpoints: Sequence[Endpoint],
    schemas: Schemas,
    settings: ServerSettings,
    open_paths: frozenset[str],
) -> dict[str, Any]:
    paths: dict[str, Any] = {}
    for one in endpoints:
        needs_key = settings.needs_key and one.path not in open_paths
        operation = _operation(one, schemas, settings.model_name, needs_key)
        if settings.needs_key and not needs_key:
            operation["security"] = []
        item = paths.setdefault(_PARAMETER.sub(r"{\1}", one.path), {})
        item[one.method.lower()] = operation
        if one.method == "GET":
            item["head"] = _without_bodies(operation)
    return paths


def _operation(one: Endpoint, schemas: Schemas, model: str, needs_key: bool) -> dict[str, Any]:
    text = inspect.getdoc(one.handler) or ""
    summary, _, rest = text.partition("\n\n")
    operation: dict[str, Any] = {
        "operationId": one.name,
        "summary": " ".join(summary.split()),
        "tags": [one.tag],
        "responses": _responses(one, schemas, model, needs_key),
    }
    if rest:
        operation["description"] = rest
    if one.parameters:
        operation["parameters"] = [
            {
                "name": name,
                "in": "path",
                "required": True,
                "description": meaning,
                "schema": {"type": "string", "minLength": 1},
                "example": model,
            }
            for name, meaning in one.parameters.items()
        ]
    if one.body is not None:
        operation["requestBody"] = {
            "required": True,
            "description": _prose_rules(one.body),
            "content": {"application/json": _body_content(one, schemas, model)},
        }
    return operation


def _prose_rules(body: type[msgspec.Struct]) -> str:
    """The rules of a body that JSON schema cannot express."""
    rules: Sequence[str] = getattr(body, "prose_rules", ())
    if not rules:
        return "A body is accepted if it matches the schema."
    lines = "\n".join(f"- {rule}" for rule in rules)
    return f"A body is accepted if it matches the schema and these rules:\n\n{lines}"


def _body_content(one: Endpoint, schemas: Schemas, model: str) -> dict[str, Any]:
    content: dict[str, Any] = {"schema": schemas.of(one.body)}
    if one.examples:
        content["examples"] = {
            name: {"value": _with_model(body, model)} for name, body in one.examples.items()
        }
    return content


def _responses(one: Endpoint, schemas: Schemas, model: str, needs_key: bool) -> dict[str, Any]:
    responses: dict[int, Any] = {}
    for reply in one.replies:
        response = responses.setdefault(
            reply.status, {"description": "", "headers": _headers_of(reply.status), "content": {}}
        )
        response["description"] = f"{response['description']} {reply.description}".strip()
        response["content"][reply.media_type] = _reply_content(reply, schemas, model)
        if reply.links:
            response["links"] = dict(reply.links)
    statuses = [*OF_EVERY_ROUTE, *one.refusals, *(OF_BODIES if one.body else ())]
    for status in [*statuses, *([401] if needs_key else [])]:
        refusal = {"$ref": f"#/components/responses/{_refusal_name(status)}"}
        responses.setdefault(status, refusal)
    return {str(status): responses[status] for status in sorted(responses)}


def _reply_content(reply: Reply, schemas: Schemas, model: str) -> dict[str, Any]:
    schema = schemas.of(reply.type)
    if reply.media_type == EVENTS:
        schema = _event_of(schema)
    content: dict[str, Any] = {"schema": schema}
    if reply.example is not None:
        content["example"] = _with_model(reply.example, model)
    return content


def _event_of(frame: dict[str, Any]) -> dict[str, Any]:
    """One server-sent event: its data is a frame as JSON, or the end mark of the stream."""
    frames = {"anyOf": [frame, {"$ref": f"{REFERENCE}FrameError"}]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": frames}
    return {
        "type": "object",
        "description": "One event.",
        "properties": {"data": {"anyOf": [data, {"const": "[DONE]"}]}},
        "required": ["data"],
    }


def _without_bodies(operation: dict[str, Any]) -> dict[str, Any]:
    """The operation by HEAD: the same statuses and headers."""
    responses = {
        status: {
            "description": REFUSALS.get(int(status), "As with GET, without a body."),
            "headers": _headers_of(int(status)),
        }
        for status in operation["responses"]
    }
    summary = f"{operation['summary']} Without its body."
    name = f"head{operation['operationId'].removeprefix('get')}"
    return operation | {"operationId": name, "summary": summary, "responses": responses}


def _refusal_name(status: int) -> str:
    return f"Refused{status}"


def _refusal(status: int) -> dict[str, Any]:
    return {
        "description": REFUSALS[status],
        "headers": _headers_of(status),
        "content": {"application/json": {"schema": {"$ref": f"{REFERENCE}ErrorBody"}}},
    }


def _headers_of(status: int) -> dict[str, Any]:
    names = ("X-Request-Id", *_HEADERS_OF_STATUS.get(status, ()))
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _with_model(example: Any, model: str) -> Any:
    """The example with this server's model name."""
    if isinstance(example, dict):
        return {
            key: model if key in ("model", "model_id") else _with_model(inner, model)
            for key, inner in example.items()
        }
    if isinstance(example, list):
        return [_with_model(inner, model) for inner in example]
    return example


def _inner_types(info: Any) -> Iterator[Any]:
    """The types of a type's fields, items, options, keys and values."""
    for name in ("type", "item_type", "key_type", "value_type"):
        if isinstance(inner := getattr(info, name, None), msgspec.inspect.Type):
            yield inner
    yield from getattr(info, "types", ())
    for field in getattr(info, "fields", ()):
        yield field.type


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """Every object within a schema, itself first."""
    if isinstance(schema, dict):
        yield schema
        for inner in schema.values():
            yield from _parts(inner)
    elif isinstance(schema, list):
        for inner in schema:
            yield from _parts(inner)
