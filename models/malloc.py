"""Decides when large freed buffers return to the system: at once while loading, rarely later.

Owns three settings of glibc's allocator; under another C library these functions do nothing.

Loading: each freed mapped buffer raises the size from which glibc maps buffers, up to 32 MiB. Later
buffers come from the heap, where a long-lived quantized weight after each freed full-precision one
keeps the hole resident: a 100 M model took three times its quantized size to load.

Computing: a step allocates what the last step freed. glibc returns the heap's free end beyond
64 MiB, and whole heaps of other threads; every page then faults again in the next step. That cost a
third of the time of a decode of 64 sequences.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_SMALL = 128 << 10
# where glibc's adjustment ends; some releases accept no more
_LARGEST = 32 << 20
# larger than a step's buffers, except in models so large that faults do not matter
_KEPT = 256 << 20
_FREE_END = 1 << 30


@contextmanager
def large_buffers_mapped() -> Iterator[None]:
    """Return freed buffers of 128 KiB or more to the system at once, within the context."""
    mallopt = _mallopt()
    mallopt(_M_MMAP_THRESHOLD, _SMALL)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST)


def return_freed_buffers() -> None:
    """From now on give a freed buffer of 128 KiB or more back to the system at once.

    For a process that handles requests: their bodies have all sizes and live side by side, so
    freed ones would leave holes in the heap that stay resident.
    """
    _mallopt()(_M_MMAP_THRESHOLD, _SMALL)


def use_one_heap() -> None:
    """Let all threads allocate from the main heap, which alone keeps freed memory.

    Call it before threads start.
    """
    _mallopt()(_M_ARENA_MAX, 1)


def keep_freed_buffers() -> None:
    """Keep freed buffers of up to 256 MiB, 1 GiB in all, for the next step."""
    mallopt = _mallopt()
    if not mallopt(_M_MMAP_THRESHOLD, _KEPT):
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
    mallopt(_M_TRIM_THRESHOLD, _FREE_END)


def _mallopt() -> Callable[[int, int], int]:
    """glibc's mallopt; a function that does nothing under another C library."""
    try:
        return ctypes.CDLL(None).mallopt
    except AttributeError:
        return lambda option, value: 0
