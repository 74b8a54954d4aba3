"""One HTTP worker process: `python -m vlmserve.server.worker` reads its settings from stdin.

Owns the process: its socket, its signals, its log, and that it exits with its parent. Knows
nothing of requests.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import ssl
import sys
from typing import Any

import msgspec
from sanic import Sanic

from ...models.malloc import return_freed_buffers
from ...router.processes.logs import say, set_up_logging
from ...router.processes.parent_death import ParentGoneError, die_with_parent
from ..http.connection_places import MAX_LINGERING, NUM_PROBE_PLACES, NUM_RESERVED_PLACES
from ..http.protocol import ProbeProtocol, StrictProtocol
from ..http.tls import ServerTls
from ..settings import ServerSettings
from ..supervisor.worker_liveness import beat
from .app import build_app

# Listening socket, engine, children's pipes, fetches, the event loop's own, and connections that
# have no place of their own (`http/connection_places.py`).
OWN_DESCRIPTORS = 200 + NUM_RESERVED_PLACES + MAX_LINGERING + NUM_PROBE_PLACES


def main() -> None:
    """Serve until SIGTERM or SIGINT.

    Exits with code 2 and one line on stderr if the settings or the checkpoint are unusable.
    """
    parent = os.getppid()
    return_freed_buffers()
    # The default action would end a worker that is still starting.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # One text at a time: a thread pool would only take cores from the engine.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        settings = msgspec.json.decode(sys.stdin.buffer.read(), type=ServerSettings)
        set_up_logging(settings.log_level, settings.log_format, "worker")
        die_with_parent(parent)
        _allow_descriptors(settings.max_connections)
        app = build_app(settings)
        tls = _tls_of(settings)
        listening = _inherited_socket(settings.listen_fd)
        probes = None if settings.probe_fd is None else _inherited_socket(settings.probe_fd)
    except (msgspec.DecodeError, OSError, ValueError, ParentGoneError) as error:
        sys.exit(_fail(error))
    _freeze_startup_objects(app)
    _reload_on_sighup(app, tls)
    _report_liveness(app, settings.liveness_fd)
    _prepare(app, listening, tls, settings.request_timeout_s)
    if probes is not None:
        _listen(app, probes, ProbeProtocol)
    Sanic.serve_single(primary=app)


def _prepare(
    app: Sanic[Any, Any], listening: socket.socket, tls: ServerTls | None, handshake_s: float
) -> None:
    """Serve the port of the API once the app runs. handshake_s: maximum time of a TLS handshake.

    A connection has a place in `http/connection_places.py` only after its handshake, so until then
    nothing but this time bounds how long it keeps a descriptor.
    """
    context = None if tls is None else tls.context
    _listen(app, listening, StrictProtocol, context)
    if context is not None:
        options = {"ssl_handshake_timeout": handshake_s}
        app.state.server_info[0].settings["asyncio_server_kwargs"] = options


def _listen(
    app: Sanic[Any, Any],
    listening: socket.socket,
    protocol: type[StrictProtocol],
    context: ssl.SSLContext | None = None,
) -> None:
    app.prepare(
        sock=listening,
        ssl=context,
        protocol=protocol,
        single_process=True,
        access_log=False,
        motd=False,
    )


def _allow_descriptors(num_connections: int) -> None:
    """Raise the limit of open files to every connection plus the worker's own files.

    Raises ValueError if the system's hard limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_connections + OWN_DESCRIPTORS
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise ValueError(
            f"--max-connections is {num_connections}; this system allows a process {hard} open"
            f" files, of which {OWN_DESCRIPTORS} are kept: lower it or raise the limit (ulimit -Hn)"
        )
    if soft != resource.RLIM_INFINITY and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _tls_of(settings: ServerSettings) -> ServerTls | None:
    """Raises TlsError."""
    if settings.tls_certfile is None:
        return None
    return ServerTls(settings.tls_certfile, settings.tls_keyfile)


def _reload_on_sighup(app: Sanic[Any, Any], tls: ServerTls | None) -> None:
    """Reload keys and certificate at SIGHUP, from when the event loop runs."""

    def reload() -> None:
        app.ctx.access.keys.reload()
        if tls is not None:
            tls.reload()

    @app.before_server_start
    async def listen(app: Sanic[Any, Any]) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)


def _freeze_startup_objects(app: Sanic[Any, Any]) -> None:
    """Exclude modules, routes and the tokenizer from garbage collections, once all are loaded.

    A full collection stops the event loop. With 70,000 such objects it takes 80 to 220 ms, with
    them frozen 20 to 36 ms under load.
    """

    @app.after_server_start
    async def freeze(app: Sanic[Any, Any]) -> None:
        gc.collect()
        gc.freeze()


def _report_liveness(app: Sanic[Any, Any], liveness_fd: int | None) -> None:
    """Send heartbeats to the supervisor for as long as the event loop runs."""
    if liveness_fd is None:
        return
    # A decoder that outlives the worker for a moment must not keep the pipe open.
    os.set_inheritable(liveness_fd, False)

    @app.before_server_start
    async def start(app: Sanic[Any, Any]) -> None:
        app.ctx.heartbeat = asyncio.create_task(beat(liveness_fd))

    @app.after_server_stop
    async def stop(app: Sanic[Any, Any]) -> None:
        app.ctx.heartbeat.cancel()


def _fail(error: Exception) -> int:
    say(f"HTTP worker cannot start: {error}", logging.ERROR)
    return 2


def _inherited_socket(descriptor: int | None) -> socket.socket:
    if descriptor is None:
        raise ValueError("listen_fd is not set: a worker serves a socket that it inherits")
    listening = socket.socket(fileno=descriptor)
    listening.setblocking(False)
    # For this process only: a decoder reads untrusted files and must not get the socket.
    listening.set_inheritable(False)
    return listening


if __name__ == "__main__":
    main()
