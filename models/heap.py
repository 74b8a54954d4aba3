"""Gives large freed buffers back to the system while a model is loaded.

Owns two settings of glibc's allocator. Knows nothing of models.

glibc raises the size from which it maps a buffer by itself as such buffers are freed, up to 32 MiB;
later ones then come from its heap, where a long-lived quantized weight behind each freed
full-precision one keeps the hole resident: m100 took three times its quantized size to load.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SMALL = 128 << 10
# where glibc's own adjustment ends: mapping at every step's activations would cost page faults
_LARGEST = 32 << 20


@contextmanager
def large_buffers_mapped() -> Iterator[None]:
    """Within it, a freed buffer of 128 KiB or more leaves the process at once; glibc only."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _SMALL)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST)
