"""Starts, watches and stops the processes of the ranks other than the first.

A rank exits when its socket closes, so it ends with the first rank, even in the middle of a
collective. If a rank dies, the others wait in a collective forever, so `on_death` must end the
process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

import msgspec

from ..errors import ModelError
from . import wire
from .wire import RankSettings, RankStep

logger = logging.getLogger(__name__)

END_TIMEOUT_S = 5.0
# how long the first rank waits for the error of a rank that cannot load
REPORT_TIMEOUT_S = 10.0


def end_process(line: str) -> None:
    """End this process now: a step that waits for a dead rank would never end."""
    logger.error("%s: the engine exits", line)
    logging.shutdown()
    os._exit(1)


class Ranks:
    """The processes of the other ranks, from their start to `close`."""

    def __init__(
        self,
        first: RankSettings,
        on_death: Callable[[str], None] = end_process,
    ) -> None:
        """Start the processes, which load their shares. first: the first rank's settings."""
        self._on_death = on_death
        self._is_closing = threading.Event()
        self._is_ready = False
        self._connections: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(1, first.size):
                self._start(msgspec.structs.replace(first, rank=rank))
        except BaseException:
            self.close()
            raise

    def _start(self, settings: RankSettings) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", f"{__package__}.rank_process", str(theirs.fileno())]
            process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
        self._connections.append(ours)
        self._processes.append(process)
        ours.sendall(wire.frame_of(settings))
        watch = threading.Thread(
            target=self._watch, args=(settings.rank, process), name="rank-watch", daemon=True
        )
        watch.start()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def wait_ready(self) -> None:
        """Wait until every rank has loaded. Raises ModelError, one line, if a rank cannot."""
        for connection in self._connections:
            self._receive_ready(connection)
        self._is_ready = True

    def raise_reported_error(self) -> None:
        """Raise ModelError if a rank soon reports why it cannot load, or has ended.

        A rank that still loads, or waits for the others, reports nothing.
        """
        readable, _, _ = select.select(self._connections, [], [], REPORT_TIMEOUT_S)
        for connection in readable:
            self._receive_ready(connection)

    def _receive_ready(self, connection: socket.socket) -> None:
        rank = self._connections.index(connection) + 1
        body = wire.receive(connection)
        if body is None:
            raise ModelError(f"rank {rank} exited while it loaded the model")
        if (error := wire.ready_decoder.decode(body).error) is not None:
            raise ModelError(f"rank {rank}: {error}")

    def compute(self, step: RankStep) -> None:
        """Send a step to every rank; they compute it at the same time as the caller."""
        frame = wire.frame_of(step)
        for connection in self._connections:
            connection.sendall(frame)

    def close(self) -> None:
        """Stop all ranks, and kill those that do not exit in END_TIMEOUT_S."""
        self._is_closing.set()
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_TIMEOUT_S)
            if process.poll() is None:
                process.kill()
                process.wait()

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        status = process.wait()
        if not self._is_ready:
            self._is_closing.wait(REPORT_TIMEOUT_S)
        if not self._is_closing.is_set():
            self._on_death(f"rank {rank} died ({_how(status)})")


def _how(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit code {status}"
