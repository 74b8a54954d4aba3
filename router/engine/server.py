"""The engine's socket: workers connect, send requests and receive outputs.

Owns the Unix socket, the connections and the heartbeats. Knows nothing of what runs: it passes
requests to the `Engine`, which answers through `send`. A worker that violates the protocol, or
does not read, loses its connection and its requests; other workers are not affected.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import stat
from collections.abc import Iterator

from ..config import EngineConfig
from ..errors import AdapterUnusableError, EngineDeadError, WireError, failure_of
from ..messages import (
    AdapterAnswer,
    AdapterFailed,
    AdapterReady,
    AdapterUnloaded,
    AddRequest,
    EngineStats,
    FromEngine,
    Heartbeat,
    ImagePiece,
    LoadAdapter,
    ToEngine,
    UnloadAdapter,
)
from ..processes import wire
from .engine import DuplicateRequestError, Engine

logger = logging.getLogger("vlmserve.engine")

FLUSH_TIMEOUT_S = 1.0
LOADING = "the engine is still loading its model"


class SocketPathError(OSError):
    """The engine cannot listen at this path."""


class EngineServer:
    """Listens after `start`, serves requests after `attach`, ends with `close`."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._engine: Engine | None = None
        self._server: asyncio.Server | None = None
        self._workers: dict[int, asyncio.StreamWriter] = {}
        self._worker_ids = itertools.count(1)
        self._heartbeat_task: asyncio.Task[None] | None = None
        self._calls: set[asyncio.Task[None]] = set()

    @property
    def num_workers(self) -> int:
        return len(self._workers)

    async def start(self) -> None:
        """Listen. Raises SocketPathError, with the remedy, if the path cannot be used."""
        listening = _listen(self._config.socket_path)
        self._server = await asyncio.start_unix_server(
            self._serve_worker, sock=listening, limit=wire.READ_BUFFER_BYTES
        )
        self._heartbeat_task = asyncio.create_task(self._beat(), name="heartbeat")
        self._heartbeat_task.add_done_callback(_log_failure)

    def attach(self, engine: Engine) -> None:
        """Serve requests by `engine` from now on, and send every worker its ready message."""
        self._engine = engine
        for worker_id in list(self._workers):
            self.send(worker_id, engine.ready_message())

    def send(self, worker_id: int, message: FromEngine) -> None:
        """Send without waiting. Ignores a worker that has disconnected; drops one that is stuck."""
        writer = self._workers.get(worker_id)
        if writer is None:
            return
        writer.write(wire.encode_frame(message))
        if writer.transport.get_write_buffer_size() > self._config.max_outgoing_bytes:
            logger.error("dropped worker %d: it does not read its outputs", worker_id)
            self._hang_up(worker_id)

    async def close(self) -> None:
        """Flush what was sent, close all connections and remove the socket."""
        if self._heartbeat_task is not None:
            self._heartbeat_task.cancel()
        for call in self._calls:
            call.cancel()
        if self._server is not None:
            self._server.close()
        writers, self._workers = list(self._workers.values()), {}
        for writer in writers:
            writer.close()
        closing = [asyncio.ensure_future(writer.wait_closed()) for writer in writers]
        if closing:
            await asyncio.wait(closing, timeout=FLUSH_TIMEOUT_S)
        for flush in closing:
            flush.cancel()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._config.socket_path)

    async def _serve_worker(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        worker_id = next(self._worker_ids)
        self._workers[worker_id] = writer
        if self._engine is not None:
            self.send(worker_id, self._engine.ready_message())
        try:
            await self._receive_from(worker_id, reader)
        except (WireError, DuplicateRequestError) as error:
            logger.error("dropped worker %d: it violated the protocol: %s", worker_id, error)
        except OSError as error:
            logger.warning("lost worker %d: %s", worker_id, error)
        except asyncio.CancelledError:
            pass  # the loop ends; asyncio would log the cancelled handler as an error
        finally:
            self._hang_up(worker_id)
            if self._engine is not None:
                self._engine.drop_worker(worker_id)

    async def _receive_from(self, worker_id: int, reader: asyncio.StreamReader) -> None:
        limit = self._config.max_frame_bytes
        while message := await wire.read_message(reader, wire.to_engine_decoder, limit):
            self._handle(worker_id, message)
            # A worker with many frames must not delay the others.
            await asyncio.sleep(0)

    def _handle(self, worker_id: int, message: ToEngine) -> None:
        if isinstance(message, LoadAdapter | UnloadAdapter):
            call = asyncio.create_task(self._answer_call(worker_id, message))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
        elif self._engine is None:
            if isinstance(message, AddRequest):
                error = EngineDeadError(LOADING)
                for request_id in message.answer_ids:
                    self.send(worker_id, failure_of(request_id, error))
        elif isinstance(message, AddRequest):
            self._engine.add(worker_id, message)
        elif isinstance(message, ImagePiece):
            self._engine.receive(worker_id, message)
        else:
            self._engine.abort(worker_id, message.request_ids)

    async def _answer_call(self, worker_id: int, message: LoadAdapter | UnloadAdapter) -> None:
        self.send(worker_id, await self._call(message))

    async def _call(self, message: LoadAdapter | UnloadAdapter) -> AdapterAnswer:
        call_id, engine = message.call_id, self._engine
        if isinstance(message, UnloadAdapter):
            if engine is not None:
                await engine.unload_adapter(message.digest)
            return AdapterUnloaded(call_id=call_id)
        if engine is None:
            return AdapterFailed(call_id=call_id, message=LOADING)
        try:
            info = await engine.load_adapter(message.adapter)
        except AdapterUnusableError as error:
            return AdapterFailed(call_id=call_id, message=str(error))
        return AdapterReady(call_id=call_id, info=info)

    def _hang_up(self, worker_id: int) -> None:
        """Close at once, without flushing. Its reader then ends, which aborts its requests."""
        if writer := self._workers.pop(worker_id, None):
            writer.transport.abort()

    async def _beat(self) -> None:
        while True:
            heartbeat = _heartbeat_of(self._engine)
            for worker_id in list(self._workers):
                self.send(worker_id, heartbeat)
            await asyncio.sleep(self._config.heartbeat_interval_s)


def _log_failure(heartbeats: asyncio.Task[None]) -> None:
    """Log why heartbeats stopped. The supervisor will end this process for it."""
    if not heartbeats.cancelled() and (error := heartbeats.exception()) is not None:
        logger.error("heartbeats failed", exc_info=error)


def _heartbeat_of(engine: Engine | None) -> Heartbeat:
    if engine is None:
        return Heartbeat(stats=EngineStats())
    watch = engine.step_watchdog
    return Heartbeat(
        stats=engine.stats(),
        step_age_s=watch.age_s,
        stall_s=watch.stall_s,
        may_compile=watch.is_first_of_kind,
    )


def _listen(path: str) -> socket.socket:
    """A listening Unix socket at `path` that only this user may open."""
    _remove_stale(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _umask(0o177):
            listening.bind(path)
    except OSError as error:
        listening.close()
        raise SocketPathError(
            f"cannot listen on the socket {path!r}: {error.strerror or error}; use a path of at "
            "most 107 bytes in an existing folder that you may write"
        ) from error
    listening.listen()
    listening.setblocking(False)
    return listening


def _remove_stale(path: str) -> None:
    """Remove the socket of a killed engine. Raises SocketPathError if an engine listens on it."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise SocketPathError(f"{path!r} exists and is not a socket: remove it")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError:
            os.unlink(path)
            return
    raise SocketPathError(f"another engine listens on {path!r}: stop it or use another path")


@contextlib.contextmanager
def _umask(mask: int) -> Iterator[None]:
    """Create files with `mask` inside, so that their mode is right from the start."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
