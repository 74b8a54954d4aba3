"""The processes of the ranks beside the first one, as the first one sees them.

Owns their start, what they are told and their end. Knows nothing of models or collectives.

A rank lives by its socket: when the first rank goes away, however it ends, the other end closes and
the rank ends at once, also in the middle of a collective. A rank that dies leaves the others in a
collective that cannot end, so `on_death` has to end the process.
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

from ..batch import StepBatch
from ..errors import ModelError
from . import wire
from .wire import RankSettings

logger = logging.getLogger(__name__)

END_TIMEOUT_S = 5.0
# a rank that cannot load says why and goes; the first one then has so long to hear it
LAST_WORD_S = 10.0


def end_process(line: str) -> None:
    """End this process now: a step that waits for a dead rank never ends."""
    logger.error("%s: this engine ends", line)
    logging.shutdown()
    os._exit(1)


class Ranks:
    """The other ranks' processes, from their start to `close`."""

    def __init__(
        self,
        first: RankSettings,
        on_death: Callable[[str], None] = end_process,
    ) -> None:
        """Starts them, with the settings of the first rank; they load their shares meanwhile."""
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
        """Wait until every rank has loaded. Raises ModelError, one line, for one that cannot."""
        for connection in self._connections:
            self._hear(connection)
        self._is_ready = True

    def raise_last_words(self) -> None:
        """Raise ModelError for a rank that says soon why it cannot load, or has ended.

        One that loads on, or waits for the others, says nothing.
        """
        speaking, _, _ = select.select(self._connections, [], [], LAST_WORD_S)
        for connection in speaking:
            self._hear(connection)

    def _hear(self, connection: socket.socket) -> None:
        rank = self._connections.index(connection) + 1
        body = wire.receive(connection)
        if body is None:
            raise ModelError(f"rank {rank} ended while it loaded the model")
        if (error := wire.ready_decoder.decode(body).error) is not None:
            raise ModelError(f"rank {rank}: {error}")

    def compute(self, batch: StepBatch) -> None:
        """Let every rank compute a step, at the same time as the caller."""
        frame = wire.frame_of(batch)
        for connection in self._connections:
            connection.sendall(frame)

    def close(self) -> None:
        """End them all; those that do not go by themselves are killed."""
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
            self._is_closing.wait(LAST_WORD_S)
        if not self._is_closing.is_set():
            self._on_death(f"rank {rank} ended ({_how(status)})")


def _how(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit code {status}"
