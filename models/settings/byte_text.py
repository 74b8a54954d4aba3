"""Writes amounts of memory for messages."""

from __future__ import annotations

_STEPS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def shown_bytes(num_bytes: int) -> str:
    """ "21.3 GiB", "640.0 MiB" or "12 B"."""
    for unit, size in _STEPS:
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} B"
