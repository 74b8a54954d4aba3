"""How many threads compute, and how they wait for each other.

Never imports torch, which reads these settings when it is imported.
"""

from __future__ import annotations

import os

# read by GNU's runtime, which torch's CPU builds use
_USER_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
# a few tenths of a millisecond: longer than the gap between two products of a step
_SPINS = "20000"


def threads_of_one(num_processes: int) -> int | None:
    """Threads of each process that shares the cores; None if OMP_NUM_THREADS is set."""
    if "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, len(os.sched_getaffinity(0)) // num_processes)


def wait_briefly() -> None:
    """Let waiting threads spin for a moment, then sleep. Call it before torch is imported.

    A thread that keeps spinning takes its core from HTTP and image decoding; a thread that sleeps
    at once wakes too late for the next product. The user's environment variables win.
    """
    if not any(name in os.environ for name in _USER_SETTINGS):
        os.environ["GOMP_SPINCOUNT"] = _SPINS
