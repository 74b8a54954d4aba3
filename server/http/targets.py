"""Requests for routes that do not exist: the message of the 404, and the spelling of paths.

Owns the sentences for routes of other servers. Knows no route of this one.
"""

from __future__ import annotations

import re

# Other servers' routes by their beginning, and why they are not here.
_UNSERVED = {
    "/v1/assistants": "use /v1/responses",
    "/v1/audio/": "this model neither hears nor speaks",
    "/v1/batches": "use vlmserve run-batch, or send the requests themselves",
    "/v1/embeddings": "this model generates text; it has no embeddings",
    "/v1/files": "send pictures as data URLs",
    "/v1/fine_tuning/": "this server does not train",
    "/v1/images/": "this model reads pictures; it does not draw them",
    "/v1/realtime": "stream /v1/chat/completions instead",
    "/v1/rerank": "this model generates text; it ranks nothing",
    "/v1/score": "use /v1/completions with echo, logprobs and max_tokens 0",
    "/v1/threads": "use /v1/responses",
    "/v1/uploads": "send pictures as data URLs",
    "/v1/vector_stores": "this server stores no documents",
    "/v1/videos": "this model reads pictures; send frames of a video",
}
_SLASHES = re.compile(rb"/{2,}")
MAX_SHOWN_CHARS = 200


def not_found(path: str) -> str:
    """The message of a 404 for this path."""
    for start, reason in _UNSERVED.items():
        if path == start.rstrip("/") or path.startswith(start.rstrip("/") + "/"):
            return f"{start.rstrip('/')} is not served: {reason}. See /docs for what is"
    return f"{path[:MAX_SHOWN_CHARS]!r} is not a route of this server: see /docs"


def plain_url(url: bytes) -> bytes:
    """The request's target with single slashes and none at its end; a query stays as it is."""
    path, mark, query = url.partition(b"?")
    if not path.startswith(b"/"):
        return url
    return (_SLASHES.sub(b"/", path).rstrip(b"/") or b"/") + mark + query
