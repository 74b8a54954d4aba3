"""Decides when large freed buffers go back to the system: at once while loading, hardly ever later.

Owns three settings of glibc's allocator; nothing happens under another C library. Knows nothing of
models.

Loading: glibc raises the size from which it maps a buffer by itself as such buffers are freed, up
to 32 MiB; later ones then come from its heap, where a long-lived quantized weight behind each freed
full-precision one keeps the hole resident: m100 took three times its quantized size to load.

Computing: what a step frees is what the next one asks for. glibc gives the heap's free end back
beyond 64 MiB, and whole heaps of threads other than the main one; every page then faults again in
the next step, a third of the time of a decode of 64 sequences of m100.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_SMALL = 128 << 10
# where glibc's own adjustment ends, and the most that some releases take
_LARGEST = 32 << 20
# a step's buffers are smaller, but for a few of models so large that faults do not count
_KEPT = 256 << 20
_FREE_END = 1 << 30


@contextmanager
def large_buffers_mapped() -> Iterator[None]:
    """Within it, a freed buffer of 128 KiB or more leaves the process at once; glibc only."""
    mallopt = _mallopt()
    mallopt(_M_MMAP_THRESHOLD, _SMALL)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST)


def use_one_heap() -> None:
    """Let all threads allocate from the main heap: only that one keeps what is freed.

    Call it before threads start.
    """
    _mallopt()(_M_ARENA_MAX, 1)


def keep_freed_buffers() -> None:
    """From now on keep freed buffers up to 256 MiB, and up to 1 GiB in all, for the next step."""
    mallopt = _mallopt()
    if not mallopt(_M_MMAP_THRESHOLD, _KEPT):
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
    mallopt(_M_TRIM_THRESHOLD, _FREE_END)


def _mallopt() -> Callable[[int, int], int]:
    """glibc's function of that name; one that does nothing under another C library."""
    try:
        return ctypes.CDLL(None).mallopt
    except AttributeError:
        return lambda option, value: 0
