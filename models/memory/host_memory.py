"""How much memory the machine and the control groups leave this process. Imports no torch.

Reads /proc/meminfo and control groups of both versions.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..settings.byte_text import shown_bytes

# control groups write "no limit" as a number near 2**63
_NO_LIMIT = 1 << 60


@dataclass(slots=True, frozen=True)
class AvailableMemory:
    """Bytes that this process may still take of a device; source: the reading, for messages."""

    num_bytes: int
    source: str


def available_cpu_memory(root: Path = Path("/")) -> AvailableMemory:
    """The memory that can be used without swapping. root: the parent of /proc and /sys."""
    readings = [_machine_memory(root), *_cgroup_memory(root)]
    return min(readings, key=lambda memory: memory.num_bytes)


def _machine_memory(root: Path) -> AvailableMemory:
    try:
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                num_bytes = int(line.split()[1]) * 1024
                return AvailableMemory(num_bytes, f"{shown_bytes(num_bytes)} available")
    except (OSError, ValueError, IndexError):
        pass
    num_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return AvailableMemory(num_bytes, f"{shown_bytes(num_bytes)} free")


def _cgroup_memory(root: Path) -> Iterator[AvailableMemory]:
    """The memory that each control group around this process leaves, of either version."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", _VERSION_2
        elif "memory" in controllers.split(","):
            base, names = root / "sys/fs/cgroup/memory", _VERSION_1
        else:
            continue
        for folder in _with_parents(base, path):
            if (memory := _left_by_group(folder, names)) is not None:
                yield memory


@dataclass(slots=True, frozen=True)
class _Files:
    """The file names of one cgroup version; prefix: of its counters that include children."""

    limit: str
    usage: str
    prefix: str


_VERSION_1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_VERSION_2 = _Files("memory.max", "memory.current", "")


def _with_parents(base: Path, path: str) -> Iterator[Path]:
    """The group's folder and its parents; in a container the group's folder is `base` itself."""
    folder = base / path.strip("/")
    while folder != base:
        yield folder
        folder = folder.parent
    yield base


def _left_by_group(folder: Path, files: _Files) -> AvailableMemory | None:
    """The group's limit minus the memory that cannot be dropped; None without a limit."""
    limit = _number(folder / files.limit)
    if limit is None or limit >= _NO_LIMIT:
        return None
    used = _number(folder / files.usage) or 0
    cached = _cached_bytes(folder / "memory.stat", files.prefix)
    left = max(0, limit - max(0, used - cached))
    return AvailableMemory(
        left, f"the {shown_bytes(left)} that a limit of {shown_bytes(limit)} leaves"
    )


def _cached_bytes(file: Path, prefix: str) -> int:
    """Bytes of cached file contents, which the system drops when memory is needed."""
    names = (f"{prefix}inactive_file", f"{prefix}active_file")
    try:
        pairs = [line.split() for line in file.read_text(encoding="ascii").splitlines()]
        return sum(int(pair[1]) for pair in pairs if pair[0] in names)
    except (OSError, ValueError, IndexError):
        return 0


def _number(file: Path) -> int | None:
    """The number in a file; None if the file is missing or contains "max"."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
