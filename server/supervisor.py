"""Owns the listening socket and every child process; never imports torch.

    supervisor
      engine        python -m vlmserve.router.engine_process   settings on stdin
      HTTP worker   python -m vlmserve.server.worker           settings on stdin, socket inherited

Starts them, says when the server is ready, and ends them all: on SIGINT or
SIGTERM, and as soon as one of them dies. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from ..router.client import EngineClient
from ..router.config import EngineConfig
from ..router.errors import EngineDeadError
from ..router.messages import EngineReady
from .settings import ServerSettings

EXIT_OK = 0
EXIT_CHILD_DIED = 1
DRAIN_TIMEOUT_S = 20.0
# How long workers have to send their open requests an error once the engine is gone.
ENGINE_DEATH_GRACE_S = 2.0


class ListenError(Exception):
    """The address cannot be listened on; the message is one line for the operator."""


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket on host:port (port 0 picks a free one); raises ListenError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ListenError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port"
        ) from error
    return listener


class Supervisor:
    """Runs one engine and its HTTP workers until told to stop or a child dies.

    `on_ready` is called once with the engine's EngineReady when
    /v1/health/ready answers 200.
    """

    def __init__(
        self,
        engine: EngineConfig,
        server: ServerSettings,
        listener: socket.socket,
        on_ready: Callable[[EngineReady], None],
    ) -> None:
        self._engine_config = engine
        self._server_settings = server
        self._listener = listener
        self._on_ready = on_ready
        self._stop = asyncio.Event()
        self._num_signals = 0

    async def run(self) -> int:
        """Serve until the end; returns the process's exit code."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, self._on_signal)
        with tempfile.TemporaryDirectory(prefix="vlmserve-") as folder:
            return await self._run_children(Path(folder) / "engine.sock")

    def _on_signal(self) -> None:
        self._num_signals += 1
        self._stop.set()

    async def _run_children(self, socket_path: Path) -> int:
        engine = await _start(
            "vlmserve.router.engine_process",
            msgspec.structs.replace(self._engine_config, socket_path=str(socket_path)),
        )
        worker = await _start(
            "vlmserve.server.worker",
            msgspec.structs.replace(
                self._server_settings,
                engine_socket=str(socket_path),
                listen_fd=self._listener.fileno(),
            ),
            pass_fds=[self._listener.fileno()],
        )
        announce = asyncio.create_task(self._announce(socket_path))
        try:
            return await self._watch(engine, worker)
        finally:
            announce.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await announce
            # Else the kernel takes connections that nobody answers until the drain is over.
            self._listener.close()
            await self._end([worker, engine])

    async def _watch(
        self, engine: asyncio.subprocess.Process, worker: asyncio.subprocess.Process
    ) -> int:
        """Returns when a signal came or a child died; the exit code tells which."""
        stop = asyncio.create_task(self._stop.wait())
        engine_end = asyncio.create_task(engine.wait())
        worker_end = asyncio.create_task(worker.wait())
        try:
            await asyncio.wait([stop, engine_end, worker_end], return_when="FIRST_COMPLETED")
            if stop.done():
                _say("stopping; open requests have a few seconds, a second signal ends them now")
                return EXIT_OK
            if engine_end.done():
                _say(f"the engine ended ({_how_it_ended(engine)}); stopping")
                await asyncio.sleep(ENGINE_DEATH_GRACE_S)
            else:
                _say(f"the HTTP worker ended ({_how_it_ended(worker)}); stopping")
            return EXIT_CHILD_DIED
        finally:
            for task in (stop, engine_end, worker_end):
                task.cancel()

    async def _announce(self, socket_path: Path) -> None:
        """Wait until the engine has loaded and a worker answers; then say so once."""
        client = EngineClient(str(socket_path))
        try:
            await client.connect()
            info = await client.wait_ready()
        except EngineDeadError:
            return  # _watch sees the engine end and says how
        finally:
            await client.close()
        while not await _is_ready(self._listener):  # noqa: ASYNC110 - polls a socket
            await asyncio.sleep(0.1)
        self._on_ready(info)

    async def _end(self, children: Sequence[asyncio.subprocess.Process]) -> None:
        """SIGTERM in turn, workers first; SIGKILL at the deadline or a second signal."""
        for child in children:
            if child.returncode is None:
                child.terminate()
                await self._wait_or_kill(child)

    async def _wait_or_kill(self, child: asyncio.subprocess.Process) -> None:
        deadline = asyncio.get_running_loop().time() + DRAIN_TIMEOUT_S
        while child.returncode is None:
            if self._num_signals > 1 or asyncio.get_running_loop().time() > deadline:
                child.kill()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(child.wait(), 0.1)


async def _start(
    module: str, settings: msgspec.Struct, pass_fds: Sequence[int] = ()
) -> asyncio.subprocess.Process:
    """Start `python -m module` with its settings as JSON on stdin.

    On stdin, not on the command line: settings hold API keys. In a session of
    its own, so that Ctrl-C reaches the supervisor alone.
    """
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        stdin=asyncio.subprocess.PIPE,
        pass_fds=pass_fds,
        start_new_session=True,
    )
    assert child.stdin is not None
    child.stdin.write(msgspec.json.encode(settings) + b"\n")
    with contextlib.suppress(ConnectionError):
        await child.stdin.drain()
    child.stdin.close()
    return child


async def _is_ready(listener: socket.socket) -> bool:
    """Whether GET /v1/health/ready on this socket's address answers 200."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    request = b"GET /v1/health/ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    try:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(request)
        status_line = await asyncio.wait_for(reader.readline(), 5)
        writer.close()
    except (OSError, TimeoutError):
        return False
    return status_line.startswith(b"HTTP/1.1 200")


def _how_it_ended(child: asyncio.subprocess.Process) -> str:
    code = child.returncode or 0
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _say(line: str) -> None:
    sys.stderr.write(f"vlmserve: {line}\n")
