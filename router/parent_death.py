"""Ties a child process's life to its parent's, and names it. Linux only.

Owns two calls to the kernel. Knows nothing of what the processes do.
"""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15


class ParentGoneError(RuntimeError):
    """The process that started this one ended before it could be watched."""


def die_with_parent(parent_pid: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends, however that ends.

    parent_pid: who is expected to be the parent; None takes whoever is now.
    Raises ParentGoneError if that one ended before the kernel knew, OSError if the
    kernel refuses (prctl(2), PR_SET_PDEATHSIG).
    """
    expected = os.getppid() if parent_pid is None else parent_pid
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != expected:
        raise ParentGoneError("the parent process ended while this one started")


def name_process(name: str) -> None:
    """Have ps and top show this process as `name`, of which the kernel keeps 15 bytes."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode(), 0, 0, 0)
