"""A worker's connection to one engine: requests out, tokens in.

Owns the connection and the open requests on it. Knows nothing of HTTP, text or tensors, and never
imports torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from ...models.batch import AdapterInfo, AdapterRef, ImageTiles
from ..errors import (
    EngineDeadError,
    FrameTooLargeError,
    InvalidRequestError,
    QueueFullError,
    WireError,
    error_of,
)
from ..messages import (
    AbortRequests,
    AdapterFailed,
    AdapterReady,
    AdapterUnloaded,
    AddRequest,
    EngineReady,
    EngineStats,
    FromEngine,
    Heartbeat,
    ImagePiece,
    LoadAdapter,
    NeedImage,
    Rejection,
    RequestFailed,
    RequestsStarted,
    SequenceOutput,
    StepOutputs,
    UnloadAdapter,
)
from ..processes import wire
from .adapter_calls import AdapterCalls
from .image_sender import ImageSender
from .reconnect_pause import ReconnectPause
from .request_stream import RequestStream

logger = logging.getLogger("vlmserve.client")

CONNECT_RETRY_S = 0.05
# How long a step's rejection of new requests is valid, without a later step.
REJECTION_S = 0.25
# For a write to a lost connection uvloop raises RuntimeError; asyncio ignores it.
_LOST = (ConnectionError, RuntimeError)


class Health(Protocol):
    """An engine's state, from its heartbeats; see `EngineClient`."""

    @property
    def is_ready(self) -> bool: ...
    @property
    def heartbeat_age_s(self) -> float: ...
    @property
    def stall_s(self) -> float: ...
    @property
    def may_compile(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class HealthThresholds:
    """An engine is healthy up to these limits: heartbeat age, step without progress."""

    heartbeat_s: float = 2.0
    stall_s: float = 3.0

    def allow(self, engine: Health) -> bool:
        """True if the engine is ready, its heartbeat is recent and its step makes progress."""
        is_late = engine.heartbeat_age_s > self.heartbeat_s
        is_stuck = engine.stall_s > self.stall_s and not engine.may_compile
        return engine.is_ready and not (is_late or is_stuck)


class EngineClient:
    """One worker's connection to one engine.

    Requests go without their tiles; the engine asks for those that it lacks. Of what it does not
    read, the connection keeps 64 KiB, one more frame (a piece of an image, or the requests of one
    `generate`) and the aborts of what was sent.

    Call `connect()` once, `generate()` many times concurrently, `close()` at the end.
    on_ready: called with the engine's ready message when its model is loaded.
    on_dead: called once when the engine closes the connection or dies.
    """

    def __init__(
        self,
        socket_path: str,
        *,
        on_ready: Callable[[EngineReady], None] | None = None,
        on_dead: Callable[[], None] | None = None,
        max_frame_bytes: int = wire.DEFAULT_MAX_FRAME_BYTES,
    ) -> None:
        self.socket_path = socket_path
        self.info: EngineReady | None = None
        self.stats = EngineStats()
        self.step_age_s = 0.0
        self.stall_s = 0.0
        self.may_compile = False
        self.last_heartbeat: float | None = None
        self._on_ready = on_ready
        self._rejections: dict[str, Rejection] = {}
        self._refused_at = 0.0
        self._on_dead = on_dead
        self._max_frame_bytes = max_frame_bytes
        self._streams: dict[str, RequestStream] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._writing = asyncio.Lock()
        self._images = ImageSender(self._send)
        self._reader_task: asyncio.Task[None] | None = None
        self._state_changed = asyncio.Event()
        self._pause = ReconnectPause()
        self._adapter_calls = AdapterCalls(self._send)

    @property
    def is_connected(self) -> bool:
        return self._writer is not None

    @property
    def is_ready(self) -> bool:
        """True while the engine is connected and has loaded its model."""
        return self._writer is not None and self.info is not None

    @property
    def num_open_requests(self) -> int:
        return len(self._streams)

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the last sign of life; infinite before the first."""
        if self.last_heartbeat is None:
            return float("inf")
        return time.monotonic() - self.last_heartbeat

    def rejection(self, owner: str, priority: int) -> QueueFullError | None:
        """The error that the engine would return for a new request of this owner, if known.

        A caller need not prepare a request that would be rejected. None: unknown, the engine
        decides.
        """
        rejection = self._rejections.get(owner)
        if rejection is None or priority < 0 or not self._streams:
            return None
        if time.monotonic() - self._refused_at > REJECTION_S:
            return None
        return QueueFullError(rejection.message, rejection.retry_after_s)

    async def connect(self, timeout_s: float = 60.0) -> None:
        """Connect, waiting for the engine's socket to appear.

        Raises EngineDeadError if nothing listens there after `timeout_s`. The model may still be
        loading afterwards: see `wait_ready`. May be called again after the engine died: then it
        waits first, longer each time that a connection does not last.
        """
        assert self._writer is None, "this client is already connected"
        deadline = time.monotonic() + timeout_s
        if pause_s := self._pause.left_s():
            await asyncio.sleep(min(pause_s, timeout_s))
            if pause_s > timeout_s:
                raise EngineDeadError("the engine closes each connection; waiting to try again")
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(
                    self.socket_path, limit=wire.READ_BUFFER_BYTES
                )
                break
            except OSError as error:
                if time.monotonic() >= deadline:
                    raise EngineDeadError(
                        f"no engine answers on its socket after {timeout_s:g} s ({error.strerror})"
                    ) from error
                await asyncio.sleep(CONNECT_RETRY_S)
        self._writer = writer
        self._images = ImageSender(self._send)
        self._pause.connected()
        self._reader_task = asyncio.create_task(self._read(reader), name="engine-client")

    async def wait_ready(self, timeout_s: float | None = None) -> EngineReady:
        """The engine's ready message, which comes when its model is loaded.

        Raises EngineDeadError if the engine dies first, TimeoutError after `timeout_s`.
        """
        async with asyncio.timeout(timeout_s):
            while self.info is None:
                if self._writer is None:
                    raise EngineDeadError("the engine died before its model was loaded")
                self._state_changed.clear()
                await self._state_changed.wait()
        return self.info

    async def read_to_end(self) -> None:
        """Return when all messages that the engine sent before its end are processed."""
        if self._reader_task is not None:
            await asyncio.wait([self._reader_task])

    async def generate(self, *requests: AddRequest) -> AsyncGenerator[SequenceOutput, None]:
        """Yield the new tokens of all choices of the requests as they come.

        Each output names its choice by `request_id`; the last output of a choice has its finish
        reason. The first error ends all the requests.
        Raises QueueFullError, InvalidRequestError, EngineInternalError or EngineDeadError.
        Cancelling the caller or closing the iterator aborts the requests in the engine: use
        `contextlib.aclosing` if the loop may end early.
        """
        choice_ids = [choice_id for request in requests for choice_id in request.answer_ids]
        stream = self._open_stream(choice_ids)
        num_left = len(choice_ids)
        images = self._images
        images.open(requests)
        try:
            await self._send_requests(requests, stream)
            while num_left:
                output = await stream.next()
                num_left -= output.finish_reason is not None
                yield output
        finally:
            for request_id in choice_ids:
                self._streams.pop(request_id, None)
            images.close(requests)
            self._abort(stream, list(stream.open_ids))

    def leave(self, request_id: str) -> None:
        """Abort one choice of an open request; the caller continues with the others.

        This choice yields nothing more, not even an end. After the last choice, close the iterator.
        """
        stream = self._streams.pop(request_id, None)
        if stream is not None and request_id in stream.open_ids:
            self._abort(stream, [request_id])
            stream.leave(request_id)

    async def load_adapter(self, adapter: AdapterRef) -> AdapterInfo:
        """Have the engine read an adapter. Raises AdapterUnusableError or EngineDeadError."""
        self._check_ready()
        return await self._adapter_calls.load(adapter)

    async def unload_adapter(self, digest: str) -> None:
        """As `AdapterCalls.unload`."""
        self._check_ready()
        await self._adapter_calls.unload(digest)

    def _check_ready(self) -> None:
        if not self.is_ready:
            raise EngineDeadError("the engine is not ready")

    async def close(self) -> None:
        """Close the connection; the engine aborts open requests. Does not call `on_dead`."""
        task, self._reader_task = self._reader_task, None
        self._disconnect("this worker is stopping")
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def _open_stream(self, choice_ids: list[str]) -> RequestStream:
        if not self.is_ready:
            raise EngineDeadError("the engine is not ready")
        for request_id in choice_ids:
            if request_id in self._streams:
                raise ValueError(f"request {request_id!r} is already open on this connection")
        stream = RequestStream(choice_ids)
        self._streams |= dict.fromkeys(choice_ids, stream)
        return stream

    async def _send_requests(self, requests: Sequence[AddRequest], stream: RequestStream) -> None:
        async with self._writing:
            if self._writer is None or not stream.open_ids:
                return  # lost or left while others were written; its stream has the error
            try:
                # All or none: if one cannot be sent, no other may run.
                frames = [
                    wire.encode_frame(_without_tiles(request), self._max_frame_bytes)
                    for request in requests
                ]
            except FrameTooLargeError as error:
                raise InvalidRequestError(f"the request is too large: {error}") from error
            stream.is_sent = True
            # If the connection is lost here, the reader fails the stream.
            with contextlib.suppress(*_LOST):
                self._writer.writelines(frames)
                left = [one for request in requests for one in request.answer_ids]
                self._abort(stream, [one for one in left if one not in stream.open_ids])
                await self._writer.drain()

    async def _send(self, message: ImagePiece | LoadAdapter | UnloadAdapter) -> None:
        """Send when the engine has read most of what was sent. Raises EngineDeadError."""
        async with self._writing:
            try:
                if self._writer is None:
                    raise ConnectionResetError
                self._writer.write(wire.encode_frame(message))
                await self._writer.drain()
            except _LOST:
                raise EngineDeadError("the connection to the engine is lost") from None

    def _abort(self, stream: RequestStream, request_ids: list[str]) -> None:
        if stream.is_sent and request_ids and self._writer is not None:
            with contextlib.suppress(*_LOST):
                self._writer.write(wire.encode_frame(AbortRequests(request_ids)))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                message = await wire.read_message(
                    reader, wire.from_engine_decoder, self._max_frame_bytes
                )
                if message is None:
                    break
                self._receive(message)
        except (WireError, OSError) as error:
            logger.error("lost the engine: %s", error)
        except Exception:
            # A bug of ours. Reading ends here, so every open request must fail.
            logger.exception("processing an engine's message failed")
        self._reader_task = None
        self._pause.lost()
        self._disconnect("the engine process ended")
        if self._on_dead is not None:
            self._on_dead()

    def _receive(self, message: FromEngine) -> None:
        if isinstance(message, StepOutputs):
            self._rejections = {one.owner: one for one in message.rejections}
            self._refused_at = time.monotonic()
            for output in message.outputs:
                # An output may cross an abort on its way: it is ignored then.
                if stream := self._streams.get(output.request_id):
                    stream.deliver(output)
        elif isinstance(message, RequestsStarted):
            for request_id in message.request_ids:
                if stream := self._streams.get(request_id):
                    stream.has_started = True
        elif isinstance(message, NeedImage):
            self._images.answer(message)
        elif isinstance(message, RequestFailed):
            if stream := self._streams.get(message.request_id):
                stream.fail(message.request_id, error_of(message))
        elif isinstance(message, Heartbeat):
            self.last_heartbeat = time.monotonic()
            self.stats, self.step_age_s = message.stats, message.step_age_s
            self.stall_s, self.may_compile = message.stall_s, message.may_compile
        elif isinstance(message, AdapterReady | AdapterFailed | AdapterUnloaded):
            self._adapter_calls.receive(message)
        else:
            self.info = message
            # Counts as a heartbeat: otherwise an engine that stops before its first is never late.
            self.last_heartbeat = time.monotonic()
            self._state_changed.set()
            if self._on_ready is not None:
                self._on_ready(message)

    def _disconnect(self, reason: str) -> None:
        writer, self._writer = self._writer, None
        self._images.stop()
        self.info = self.last_heartbeat = None
        self.stats, self.stall_s = EngineStats(), 0.0
        self._rejections = {}
        self._state_changed.set()
        for request_id, stream in self._streams.items():
            if request_id in stream.open_ids:
                stream.fail(request_id, EngineDeadError(reason))
        self._adapter_calls.fail(reason)
        if writer is not None:
            writer.close()


def _without_tiles(request: AddRequest) -> AddRequest:
    images = [image.ref if isinstance(image, ImageTiles) else image for image in request.images]
    return msgspec.structs.replace(request, images=images)
