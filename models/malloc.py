"""Decides when large freed buffers return to the system: at once while loading, rarely later.

Owns three settings of glibc's allocator, and when all of its free memory is returned. Under another
C library they do nothing. Owns one setting of torch's allocator on a GPU.

Loading: each freed mapped buffer raises the size from which glibc maps buffers, up to 32 MiB. Later
buffers come from the heap, where a long-lived quantized weight after each freed full-precision one
keeps the hole resident: a 100 M model took three times its quantized size to load.

Computing: a step allocates what the last step freed. glibc returns the heap's free end beyond
64 MiB, and whole heaps of other threads; every page then faults again in the next step. That cost a
third of the time of a decode of 64 sequences.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_SMALL = 128 << 10
# torch's names of the settings of its allocator on a GPU, today's first
_GPU_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
# where glibc's adjustment ends; some releases accept no more
_LARGEST = 32 << 20
# larger than a step's buffers, except in models so large that faults do not matter
_KEPT = 256 << 20
_FREE_END = 1 << 30
# what Python, torch and the allocator may take beyond the planned memory
SLACK_BYTES = 64 << 20


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


def use_growing_segments() -> None:
    """Let torch's allocator on a GPU grow its segments, so that freed weights leave no holes.

    A 21 GB segment, from which weights were freed and joined, cannot return its holes otherwise.
    Call it before torch is imported, which reads the variable. The user's variables win.
    """
    if not any(name in os.environ for name in _GPU_SETTINGS):
        os.environ[_GPU_SETTINGS[0]] = "expandable_segments:True"


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


def private_bytes() -> int:
    """This process's resident memory that is not shared with files; 0 if it is not reported."""
    try:
        _, resident, shared, *_ = Path("/proc/self/statm").read_text("ascii").split()
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * mmap.PAGESIZE


class KeptMemory:
    """Returns freed memory to the system when the process has more than `limit_bytes`.

    Steps of changing sizes leave holes in the heap, so kept memory grows step by step. The check
    takes 0.1 ms and is made every `interval` steps. After a return the next step faults its pages
    in again, so a process that stays above the limit for other reasons returns memory only when it
    has grown by another SLACK_BYTES.
    """

    def __init__(
        self, limit_bytes: int, interval: int = 32, read: Callable[[], int] = private_bytes
    ) -> None:
        self.limit_bytes = limit_bytes
        self.num_returns = 0
        self._threshold = limit_bytes
        self._interval = interval
        self._read = read
        self._num_steps = 0

    def after_step(self) -> None:
        """Count a step; return freed memory if it is time to check and there is too much."""
        self._num_steps += 1
        if self._num_steps % self._interval or self._read() <= self._threshold:
            return
        _trim()
        self.num_returns += 1
        left = self._read()
        self._threshold = self.limit_bytes if left <= self.limit_bytes else left + SLACK_BYTES


def _trim() -> None:
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _mallopt() -> Callable[[int, int], int]:
    """glibc's mallopt; a function that does nothing under another C library."""
    try:
        return ctypes.CDLL(None).mallopt
    except AttributeError:
        return lambda option, value: 0
