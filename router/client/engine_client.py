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

from ..errors import (
    EngineDeadError,
    EngineError,
    FrameTooLargeError,
    InvalidRequestError,
    QueueFullError,
    WireError,
    error_of,
)
from ..messages import (
    AbortRequests,
    AddRequest,
    EngineReady,
    EngineStats,
    FromEngine,
    Heartbeat,
    Rejection,
    RequestFailed,
    RequestsStarted,
    SequenceOutput,
    StepOutputs,
)
from ..processes import wire
from .reconnect_pause import ReconnectPause

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


class _Stream:
    """The outputs of one `generate` call that its caller has not read yet.

    open_ids: the choices without a final message. has_started: the engine has reported that at
    least one choice started. Unread outputs of a choice are joined, so a slow caller costs only
    the memory of its token ids.
    """

    def __init__(self, choice_ids: list[str]) -> None:
        self._arrived = asyncio.Event()
        self._outputs: dict[str, SequenceOutput] = {}
        self._error: EngineError | None = None
        self.open_ids = dict.fromkeys(choice_ids)
        self.has_started = False

    def deliver(self, output: SequenceOutput) -> None:
        waiting = self._outputs.setdefault(output.request_id, output)
        if waiting is not output:
            # Fields that only the first output has stay as they are.
            waiting.token_ids += output.token_ids
            waiting.logprobs += output.logprobs
            waiting.finish_reason = output.finish_reason
            waiting.stop_token_id = output.stop_token_id
        if output.finish_reason is not None:
            self.open_ids.pop(output.request_id, None)
        self._arrived.set()

    def fail(self, request_id: str, error: EngineError) -> None:
        if isinstance(error, EngineDeadError):
            error.has_started = self.has_started
        self._error = self._error or error
        self.open_ids.pop(request_id, None)
        self._arrived.set()

    def leave(self, request_id: str) -> None:
        """Discard this choice."""
        self._outputs.pop(request_id, None)
        self.open_ids.pop(request_id, None)

    async def next(self) -> SequenceOutput:
        """The oldest unread output; raises an error only after all outputs."""
        while not self._outputs:
            if self._error is not None:
                try:
                    raise self._error
                finally:
                    # A kept error refers to its frames and they to this object: a cycle, which
                    # would keep the whole request alive until a full garbage collection.
                    self._error = None
            self._arrived.clear()
            await self._arrived.wait()
        return self._outputs.pop(next(iter(self._outputs)))


class EngineClient:
    """One worker's connection to one engine.

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
        self._streams: dict[str, _Stream] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reader_task: asyncio.Task[None] | None = None
        self._state_changed = asyncio.Event()
        self._pause = ReconnectPause()

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
        try:
            await self._send_requests(requests, stream)
            while num_left:
                output = await stream.next()
                num_left -= output.finish_reason is not None
                yield output
        finally:
            for request_id in choice_ids:
                self._streams.pop(request_id, None)
            self._abort(list(stream.open_ids))

    def leave(self, request_id: str) -> None:
        """Abort one choice of an open request; the caller continues with the others.

        This choice yields nothing more, not even an end. After the last choice, close the iterator.
        """
        stream = self._streams.pop(request_id, None)
        if stream is not None and request_id in stream.open_ids:
            self._abort([request_id])
            stream.leave(request_id)

    async def close(self) -> None:
        """Close the connection; the engine aborts open requests. Does not call `on_dead`."""
        task, self._reader_task = self._reader_task, None
        self._disconnect("this worker is stopping")
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def _open_stream(self, choice_ids: list[str]) -> _Stream:
        if not self.is_ready:
            raise EngineDeadError("the engine is not ready")
        for request_id in choice_ids:
            if request_id in self._streams:
                raise ValueError(f"request {request_id!r} is already open on this connection")
        stream = _Stream(choice_ids)
        self._streams |= dict.fromkeys(choice_ids, stream)
        return stream

    async def _send_requests(self, requests: Sequence[AddRequest], stream: _Stream) -> None:
        assert self._writer is not None, "the stream was opened on a live connection"
        try:
            # All or none: if one cannot be sent, no other may run.
            frames = [wire.encode_frame(request, self._max_frame_bytes) for request in requests]
        except FrameTooLargeError as error:
            stream.open_ids.clear()  # nothing to abort
            raise InvalidRequestError(f"the request is too large: {error}") from error
        # If the connection is lost here, the reader fails the stream.
        with contextlib.suppress(*_LOST):
            self._writer.writelines(frames)
            await self._writer.drain()

    def _abort(self, request_ids: list[str]) -> None:
        if request_ids and self._writer is not None:
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
        elif isinstance(message, RequestFailed):
            if stream := self._streams.get(message.request_id):
                stream.fail(message.request_id, error_of(message))
        elif isinstance(message, Heartbeat):
            self.last_heartbeat = time.monotonic()
            self.stats, self.step_age_s = message.stats, message.step_age_s
            self.stall_s, self.may_compile = message.stall_s, message.may_compile
        else:
            self.info = message
            # Counts as a heartbeat: otherwise an engine that stops before its first is never late.
            self.last_heartbeat = time.monotonic()
            self._state_changed.set()
            if self._on_ready is not None:
                self._on_ready(message)

    def _disconnect(self, reason: str) -> None:
        writer, self._writer = self._writer, None
        self.info = self.last_heartbeat = None
        self.stats, self.stall_s = EngineStats(), 0.0
        self._rejections = {}
        self._state_changed.set()
        for request_id, stream in self._streams.items():
            if request_id in stream.open_ids:
                stream.fail(request_id, EngineDeadError(reason))
        if writer is not None:
            writer.close()
