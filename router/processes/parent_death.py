"""Makes a child process end with its parent, and names it. Linux only.

Owns two system calls. Knows nothing of what the processes do.
"""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15


class ParentGoneError(RuntimeError):
    """The parent process ended before the kernel could watch it."""


def die_with_parent(parent_pid: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends, for whatever reason.

    parent_pid: the expected parent; None: the current parent. Raises ParentGoneError if the parent
    has ended already, OSError if the kernel rejects it (prctl(2), PR_SET_PDEATHSIG).
    """
    expected = os.getppid() if parent_pid is None else parent_pid
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != expected:
        raise ParentGoneError("the parent process ended while this one started")


def name_process(name: str) -> None:
    """Let ps and top show this process as `name`; the kernel keeps 15 bytes of it."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode(), 0, 0, 0)
