"""The process of one rank: `python -m vlmserve.models.distributed.rank_process FD`.

Reads its settings, then computes one step after another; it exits when its socket closes. FD is the
inherited end of a socket pair; see `wire.py`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
from typing import NoReturn

from ..errors import StepError
from ..execution.runner import ModelRunner
from . import wire
from .parallel_runner import create_rank
from .wire import RankReady, RankStep

logger = logging.getLogger(__name__)


def main() -> NoReturn:
    """Compute the first rank's steps until it closes the socket. Does not return."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s"
    )
    # Ctrl-C reaches all processes; the first rank decides when to stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    body = wire.receive(connection)
    if body is None:
        _exit(0)
    frames = _frames_of(connection)
    try:
        runner = create_rank(wire.settings_decoder.decode(body))
    except Exception as error:
        # one line for the operator; the first rank adds this rank's number
        line = " ".join(str(error).split())[:500] or type(error).__name__
        connection.sendall(wire.frame_of(RankReady(line)))
        logger.debug("a rank could not load", exc_info=error)
        _exit(3)
    connection.sendall(wire.frame_of(RankReady()))
    while True:
        step = wire.step_decoder.decode(frames.get())
        try:
            _take_adapters(runner, step)
            runner.execute(step.batch)
        except StepError:
            pass  # raised before anything is computed, on all ranks
        except Exception:
            logger.exception(
                "a step failed on this rank only: the ranks are out of step, so it exits"
            )
            _exit(1)


def _take_adapters(runner: ModelRunner, step: RankStep) -> None:
    """Read and forget the adapters that the first rank did. Raises AdapterError."""
    if runner.adapters is not None:
        for digest in step.forgotten:
            runner.adapters.forget(digest)
        for ref in step.read:
            runner.adapters.read(ref)


def _frames_of(connection: socket.socket) -> queue.SimpleQueue[bytes]:
    """The frames' bodies; the process exits when the first rank closes the socket.

    Read by a thread, so that the process exits even in the middle of a collective.
    """
    frames: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        while (body := wire.receive(connection)) is not None:
            frames.put(body)
        _exit(0)

    threading.Thread(target=read, name="rank-frames", daemon=True).start()
    return frames


def _exit(status: int) -> NoReturn:
    with contextlib.suppress(OSError):  # a full disk
        sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
