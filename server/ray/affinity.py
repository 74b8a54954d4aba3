"""The affinity keys of a request's JSON, for a router that neither tokenizes nor loads pictures.

The rule is that of `router/client/replica_chooser.py`: the first picture, or else the prompt's
prefixes. Here a picture is its URL or data as sent, and a prompt is its text, four bytes a token.
Reads the bodies of all routes alike, and never rejects one: that is the replica's part.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from ...router.client.replica_chooser import (
    TOKENS_OF_ONE_ANSWER,
    adapter_key,
    image_key,
    prefix_keys,
)

# The fields with prompts, in the order in which a template uses them.
PROMPT_FIELDS = ("system", "instructions", "tools", "messages", "input", "prompt")
BYTES_PER_TOKEN = 4
MAX_DEPTH = 12
# Pictures inside a message's text, as NIM's first API has them.
_TAG = re.compile(r"""<img\s+src=["']?([^"'>\s]+)""")
_MEDIA = re.compile(rb"^data:[^,]{0,256},")


@dataclass(frozen=True, slots=True)
class Affinity:
    """What a router knows of a request. weight: its load, in answers. earlier: a response's id."""

    keys: tuple[bytes, ...] = ()
    weight: float = 0.0
    earlier: str | None = None


def affinity_of(
    body: bytes, credentials: bytes, adapters: frozenset[str] = frozenset()
) -> Affinity:
    """The keys of a request with this body.

    credentials: equal for requests of one tenant alone. adapters: names of adapters; requests of
    one of them prefer the same replica.
    """
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError:
        return Affinity(weight=1.0)
    if not isinstance(fields, Mapping):
        return Affinity(weight=1.0)
    texts: list[str] = []
    picture: str | None = None
    for kind, text in _prompt(fields):
        if kind == "text":
            texts.append(text)
        elif picture is None:
            picture = text
    model = fields.get("model", fields.get("model_id"))
    model = model if isinstance(model, str) else ""
    # Adapters share little of the caches.
    owner = hashlib.sha256(credentials + model.encode(errors="surrogatepass")).digest()
    prompt = "\n".join(texts).encode(errors="surrogatepass")
    if picture is None:
        keys = prefix_keys(owner, prompt, BYTES_PER_TOKEN)
    else:
        content = _MEDIA.sub(b"", picture.encode(errors="surrogatepass"))
        keys = [image_key(owner, hashlib.sha256(content).digest())]
    if model in adapters:
        keys.append(adapter_key(model))
    count = fields.get("n")
    answers = count if type(count) is int and 0 < count <= 1024 else 1
    weight = answers + len(prompt) / BYTES_PER_TOKEN / TOKENS_OF_ONE_ANSWER
    earlier = fields.get("previous_response_id")
    return Affinity(tuple(keys), weight, earlier if isinstance(earlier, str) else None)


def _prompt(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The texts and pictures of a body, in their order."""
    for name in PROMPT_FIELDS:
        if name in fields:
            yield from _parts(fields[name], MAX_DEPTH)


def _parts(value: Any, depth: int) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        if (tag := _TAG.search(value)) is not None:
            yield "picture", tag[1]
            value = _TAG.sub("", value)
        yield "text", value
    elif depth == 0:
        return
    elif isinstance(value, list):
        for item in value:
            yield from _parts(item, depth - 1)
    elif isinstance(value, dict):
        kind = value.get("type")
        if isinstance(kind, str) and "image" in kind:
            yield "picture", max(_strings(value, depth), key=len, default="")
            return
        for item in value.values():
            yield from _parts(item, depth - 1)


def _strings(value: Any, depth: int) -> Iterator[str]:
    """Every string inside a part; the longest one of a picture's is its URL or data."""
    if isinstance(value, str):
        yield value
    elif depth and isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item, depth - 1)
