"""Ray Serve's ingress: takes each HTTP request, and has a replica of the engines answer it.

Owns the choice's inputs (`affinity.py`), the bodies that it keeps meanwhile, the retry on another
replica, and the routes that every replica is asked. What the API answers is the replicas' part.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import orjson
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..api.sse import DONE, frame, named_frame
from ..errors import (
    ApiError,
    BadRequestError,
    NotReadyError,
    OverloadedError,
    error_body,
    frame_body,
)
from ..schemas.anthropic.answers import message_error_body
from .affinity import Affinity, affinity_of
from .engine_replica import ServerLostError
from .messages import (
    ACCEPT_TIMEOUT_S,
    Accepted,
    AnswerHead,
    ForwardedRequest,
    Headers,
    WholeAnswer,
)
from .metrics_sum import sum_of_metrics

METRICS = ("/metrics", "/v1/metrics")
HEALTH = ("/health", "/v1/health/live", "/v1/health/ready")
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
# Of one connection, or set anew for the next one.
HOP_HEADERS = frozenset(
    b"connection keep-alive transfer-encoding te trailer upgrade content-length expect".split()
)
# How long a health check waits for a replica that takes it.
HEALTH_ACCEPT_TIMEOUT_S = 5.0
ALL_TIMEOUT_S = 10.0
# A request is sent again after a full queue, to this many replicas in all; after a death, once.
MAX_TRIES = 3
_LOST = (RayActorError, ServerLostError)
_QUEUE_FULL = f'"{OverloadedError.code}"'.encode()


class TooLargeError(BadRequestError):
    status = 413


@dataclass(frozen=True, slots=True)
class IngressLimits:
    """max_body_bytes: of one request; max_bytes_in_flight: of all requests of this process."""

    max_body_bytes: int
    max_bytes_in_flight: int


class Ingress:
    """The deployment that Ray's proxies call."""

    def __init__(
        self,
        engines: DeploymentHandle,
        limits: IngressLimits,
        adapters: frozenset[str] = frozenset(),
    ) -> None:
        """adapters: the names of --lora."""
        self._adapters = adapters
        self._stream = engines.options(method_name="forward", stream=True)
        self._engines = engines
        self._limits = limits
        self._bytes_in_flight = 0
        self._name = serve.get_replica_context().replica_id.unique_id

    async def __call__(self, request: Request) -> Response:
        """The answer to one request."""
        path = str(request.scope["path"])
        size = 0
        try:
            body = await self._read(request)
            size = len(body)
            self._bytes_in_flight += size
            forwarded = _forwarded(request, body)
            if path in METRICS:
                return await self._metrics(forwarded)
            if path.startswith(RESPONSES + "/"):
                return _whole(await self._one_of_all(forwarded))
            forwarded = await self._with_affinity(forwarded)
            return await self._ask(path, forwarded)
        except ApiError as error:
            return _refusal(path, error)
        finally:
            self._bytes_in_flight -= size

    async def _read(self, request: Request) -> bytes:
        """The body. Raises TooLargeError or OverloadedError before it is read, if it says so."""
        size = request.headers.get("content-length", "")
        self._check_size(int(size) if size.isascii() and size.isdigit() else 0)
        body = bytearray()
        try:
            async for piece in request.stream():
                body += piece
                self._check_size(len(body))
        except ClientDisconnect:
            raise asyncio.CancelledError from None
        return bytes(body)

    def _check_size(self, size: int) -> None:
        limits = self._limits
        if size > limits.max_body_bytes:
            raise TooLargeError(
                f"the body is larger than {limits.max_body_bytes:,} bytes (--max-body-bytes)"
            )
        if self._bytes_in_flight + size > limits.max_bytes_in_flight:
            raise OverloadedError(
                "too many bytes of requests are open: try again", retry_after_s=1.0
            )

    async def _with_affinity(self, request: ForwardedRequest) -> ForwardedRequest:
        """The request with what the router needs."""
        request = replace(request, sender=self._name)
        if not request.body:
            return request
        known = affinity_of(request.body, _credentials(request.headers), self._adapters)
        only = None if known.earlier is None else await self._owner_of(request, known)
        return replace(request, keys=known.keys, weight=known.weight, only=only)

    # One replica

    async def _ask(self, path: str, request: ForwardedRequest) -> Response:
        """The answer of the chosen replica, or of another one if that cannot start it."""
        tried: frozenset[str] = frozenset()
        has_lost_one = False
        while True:
            call = _Call(self._stream, replace(request, tried=tried))
            try:
                head = await call.head(path in HEALTH)
            except _LOST:
                await call.close()
                if has_lost_one:
                    raise NotReadyError(
                        "the engine is not available: try again later", retry_after_s=1.0
                    ) from None
                has_lost_one = True
            except BaseException:
                await call.close()
                raise
            else:
                is_last = call.replica in tried or len(tried) + 1 >= MAX_TRIES
                if is_last or not _is_full(head):
                    return _Answer(path, head, call)
                await call.close()
            tried |= {call.replica}

    # Every replica

    async def _all(self, request: ForwardedRequest) -> list[WholeAnswer]:
        """The answers of all replicas that give one. Raises NotReadyError without any."""
        answers = await self._engines.broadcast("forward_whole", request).results_async(
            timeout_s=ALL_TIMEOUT_S, return_exceptions=True
        )
        found = [answer for answer in answers if isinstance(answer, WholeAnswer)]
        if not found:
            raise NotReadyError("Service is not ready.", retry_after_s=1.0)
        return found

    async def _one_of_all(self, request: ForwardedRequest) -> WholeAnswer:
        """The answer of the replica that has what is asked for."""
        answers = await self._all(request)
        return next((one for one in answers if one.head.status != 404), answers[0])

    async def _owner_of(self, request: ForwardedRequest, known: Affinity) -> str | None:
        """The replica that keeps the response which a request continues; None if none does."""
        target = f"{RESPONSES}/{known.earlier}".encode(errors="replace")
        if not known.earlier or not known.earlier.replace("_", "").isalnum():
            return None
        answers = await self._all(replace(request, method="GET", target=target, body=b""))
        return next((one.replica for one in answers if one.head.status == 200), None)

    async def _metrics(self, request: ForwardedRequest) -> Response:
        answers = await self._all(request)
        refused = next((one for one in answers if one.head.status != 200), None)
        if refused is not None or request.method != "GET":
            return _whole(refused or answers[0])
        texts = [(one.head.body or b"").decode() for one in answers]
        return _plain(replace(answers[0].head, body=sum_of_metrics(texts)))


class _Call:
    """One call of one replica. replica: empty until it has accepted the request."""

    def __init__(self, stream: DeploymentHandle, request: ForwardedRequest) -> None:
        self.replica = ""
        self._items = stream.remote(request)
        self._is_open = True

    async def head(self, is_health: bool) -> AnswerHead:
        """The head of the answer. Raises NotReadyError, or one of _LOST."""
        wait_s = HEALTH_ACCEPT_TIMEOUT_S if is_health else ACCEPT_TIMEOUT_S
        try:
            async with asyncio.timeout(wait_s):
                accepted: Accepted = await anext(self._items)
        except TimeoutError:
            raise NotReadyError("Service is not ready.", retry_after_s=1.0) from None
        except BackPressureError:
            raise OverloadedError("the queue is full: try again", retry_after_s=1.0) from None
        self.replica = accepted.replica
        head: AnswerHead = await anext(self._items)
        return head

    async def pieces(self) -> AsyncIterator[bytes]:
        """The rest of the answer."""
        async for piece in self._items:
            yield piece
        self._is_open = False

    async def close(self) -> None:
        """Cancel what is not answered yet."""
        if self._is_open:
            self._is_open = False
            self._items.cancel()


class _Answer(Response):
    """Sends a replica's answer as it comes; cancelled when the client is gone."""

    def __init__(self, path: str, head: AnswerHead, call: _Call) -> None:
        super().__init__(status_code=head.status)
        self.raw_headers = head.headers
        self._path, self._head, self._call = path, head, call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the head, the pieces and the end."""
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self._head.status,
                    "headers": self._head.headers,
                }
            )
            if self._head.body is not None:
                await send({"type": "http.response.body", "body": self._head.body})
                # To its end: else Ray would count it as cancelled.
                async for _ in self._call.pieces():
                    pass
                return
            async for piece in self._pieces():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await self._call.close()

    async def _pieces(self) -> AsyncIterator[bytes]:
        try:
            async for piece in self._call.pieces():
                yield piece
        except _LOST:
            if not _is_event_stream(self._head.headers):
                raise
            yield _failure(self._path)


def _forwarded(request: Request, body: bytes) -> ForwardedRequest:
    scope = request.scope
    query: bytes = scope.get("query_string", b"")
    target: bytes = scope.get("raw_path") or str(scope["path"]).encode()
    headers = [(name, value) for name, value in scope["headers"] if name not in HOP_HEADERS]
    return ForwardedRequest(
        request.method, target + (b"?" + query if query else b""), headers, body
    )


def _credentials(headers: Headers) -> bytes:
    """The headers with a tenant's key; equal for requests of one tenant alone."""
    wanted = (b"authorization", b"x-api-key")
    return b"\n".join(value for name, value in headers if name in wanted)


def _is_full(head: AnswerHead) -> bool:
    return head.status == OverloadedError.status and _QUEUE_FULL in (head.body or b"")


def _is_event_stream(headers: Headers) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in headers
    )


def _failure(path: str) -> bytes:
    """The end of a stream whose replica is gone, in the form of its API."""
    error = NotReadyError("the engine is not available: try again later")
    if path.startswith(MESSAGES):
        return named_frame({"type": "error", "error": message_error_body(error)["error"]})
    if path.startswith(RESPONSES):
        return named_frame(
            {"type": "error", "code": error.type, "message": error.message, "param": None}
        )
    done = DONE if path.startswith("/v1/") else b""
    return frame(frame_body(error)) + done


def _refusal(path: str, error: ApiError) -> Response:
    """An error of the ingress itself, in the form of the API's errors."""
    body = message_error_body if path.startswith(MESSAGES) else error_body
    headers = {"content-type": "application/json"}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    return Response(orjson.dumps(body(error)), error.status, headers)


def _whole(answer: WholeAnswer) -> Response:
    return _plain(answer.head)


def _plain(head: AnswerHead) -> Response:
    response = Response(head.body, head.status)
    body = response.body
    kept = [(name, value) for name, value in head.headers if name.lower() != b"content-length"]
    response.raw_headers = [*kept, (b"content-length", str(len(body)).encode())]
    return response
