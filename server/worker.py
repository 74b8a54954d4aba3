"""One HTTP worker process: `python -m vlmserve.server.worker`, settings on stdin.

Owns the process: its socket, its parent, its log. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
import sys
from typing import Any

import msgspec
from sanic import Sanic

from ..router.logs import say, set_up_logging
from ..router.parent_death import ParentGoneError, die_with_parent
from .app import build_app
from .http.protocol import StrictProtocol
from .http.tls import ServerTls
from .settings import ServerSettings
from .supervisor.worker_liveness import beat

# Listening socket, engine, children's pipes, fetches, the event loop's own.
OWN_DESCRIPTORS = 200


def main() -> None:
    """Serve until SIGTERM or SIGINT.

    Exits with 2 and one line on stderr if the settings or the checkpoint do not serve.
    """
    parent = os.getppid()
    # Its default would end a worker that is still starting.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # One text at a time: a pool of threads would only take cores from the engine.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        settings = msgspec.json.decode(sys.stdin.buffer.read(), type=ServerSettings)
        set_up_logging(settings.log_level, settings.log_format, "worker")
        die_with_parent(parent)
        _allow_descriptors(settings.max_connections)
        app = build_app(settings)
        tls = _tls_of(settings)
        listening = _listening_socket(settings)
    except (msgspec.DecodeError, OSError, ValueError, ParentGoneError) as error:
        sys.exit(_fail(error))
    _reload_on_hangup(app, tls)
    _show_life(app, settings.liveness_fd)
    context = None if tls is None else tls.context
    app.run(
        sock=listening,
        ssl=context,
        protocol=StrictProtocol,
        single_process=True,
        access_log=False,
        motd=False,
    )


def _allow_descriptors(num_connections: int) -> None:
    """Room for every connection beside the worker's own files: without it no client could connect.

    Raises ValueError where the system's hard limit is lower.
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


def _reload_on_hangup(app: Sanic[Any, Any], tls: ServerTls | None) -> None:
    """At SIGHUP read keys and certificate again; until the loop runs they are young enough."""

    def reload() -> None:
        app.ctx.access.keys.reload()
        if tls is not None:
            tls.reload()

    @app.before_server_start
    async def listen(app: Sanic[Any, Any]) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)


def _show_life(app: Sanic[Any, Any], liveness_fd: int | None) -> None:
    """Beat for the supervisor from when the loop runs until it ends."""
    if liveness_fd is None:
        return
    # A decoder that outlives the worker for a moment must not hold it.
    os.set_inheritable(liveness_fd, False)

    @app.before_server_start
    async def begin(app: Sanic[Any, Any]) -> None:
        app.ctx.pulse = asyncio.create_task(beat(liveness_fd))

    @app.after_server_stop
    async def end(app: Sanic[Any, Any]) -> None:
        app.ctx.pulse.cancel()


def _fail(error: Exception) -> int:
    say(f"HTTP worker cannot start: {error}", logging.ERROR)
    return 2


def _listening_socket(settings: ServerSettings) -> socket.socket:
    if settings.listen_fd is None:
        raise ValueError("listen_fd is not set: a worker serves a socket it inherits")
    listening = socket.socket(fileno=settings.listen_fd)
    listening.setblocking(False)
    # For this process alone: a decoder that reads strangers' files has no use for it.
    listening.set_inheritable(False)
    return listening


if __name__ == "__main__":
    main()
