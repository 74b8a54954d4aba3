"""Makes a child process end with its parent, names it and limits its memory. Linux only.

Owns three system calls. Knows nothing of what the processes do.
"""

from __future__ import annotations

import ctypes
import os
import resource
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


def limit_address_space(num_bytes: int) -> None:
    """Limit this process's address space, for good; a lower limit of the system's stays."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = num_bytes if hard == resource.RLIM_INFINITY else min(num_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def name_process(name: str) -> None:
    """Let ps and top show this process as `name`; the kernel keeps 15 bytes of it."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode(), 0, 0, 0)
