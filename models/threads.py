"""How many threads compute, and how they wait for each other.

Never imports torch, which reads that at its import.
"""

from __future__ import annotations

import os

# GNU's runtime, which torch's CPU builds use, reads both
_SAID_BY_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
# some tenths of a millisecond: longer than the gap between two products of a step
_SPINS = "20000"


def threads_of_one(num_processes: int) -> int | None:
    """Threads of one of several that share the cores; None where OMP_NUM_THREADS says already."""
    if "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, len(os.sched_getaffinity(0)) // num_processes)


def wait_briefly() -> None:
    """Let threads spin a moment where they wait for each other, then sleep; before torch's import.

    A thread that spins on keeps its core from HTTP, image decoding and whatever else runs, and then
    waits for its own partner whom they displaced; one that sleeps at once wakes too late for the
    next product. The user's word in the environment stands.
    """
    if not any(name in os.environ for name in _SAID_BY_USER):
        os.environ["GOMP_SPINCOUNT"] = _SPINS
