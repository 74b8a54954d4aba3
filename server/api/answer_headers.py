"""Headers that say which replica computed an answer, and from which images.

For gateways that send a request where its images were encoded already.
"""

from __future__ import annotations

from sanic import HTTPResponse

from ..telemetry.request_record import RequestRecord

REPLICA_HEADER = "X-Replica"
DIGESTS_HEADER = "X-Image-Digests"
MAX_DIGESTS = 20


def name_origin(record: RequestRecord, response: HTTPResponse, replica_name: str | None) -> None:
    """Add the headers to an answer of a route that generates. replica_name: of this server."""
    if not record.is_generation:
        return
    parts = [replica_name, None if record.replica is None else str(record.replica)]
    name = "/".join(part for part in parts if part)
    if name:
        response.headers[REPLICA_HEADER] = name
    if record.image_digests:
        response.headers[DIGESTS_HEADER] = ", ".join(record.image_digests[:MAX_DIGESTS])
