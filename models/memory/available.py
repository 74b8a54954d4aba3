"""How much memory a device has for this process, and who sets the limit.

Owns the readings: /proc/meminfo, control groups of both versions, CUDA. Knows nothing of models.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..byte_text import shown_bytes

# of a CPU's memory the rest is for HTTP workers, image decoders and other programs
CPU_SHARE = 0.8
# what control groups write for "no limit" is a number near 2**63
_NO_LIMIT = 1 << 60


@dataclass(slots=True, frozen=True)
class Room:
    """Bytes that this process may still take of a device; source: what says so, in words."""

    num_bytes: int
    source: str


# a device -> its room now; tests hand in their own
RoomOf = Callable[[torch.device], Room]


def room_of(device: torch.device, gpu_memory_utilization: float, num_sharers: int = 1) -> Room:
    """What may be taken of a device now.

    A GPU: that share of its memory, less what is in use on it by anybody. A CPU: CPU_SHARE of what
    the machine has available, or of what the control group leaves, whichever is less; where
    `num_sharers` engines share it, of this one's part.
    """
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        num_bytes = int(total_bytes * gpu_memory_utilization) - (total_bytes - free_bytes)
        share = f"{gpu_memory_utilization:.0%} of {shown_bytes(total_bytes)}"
        return Room(
            max(0, num_bytes), f"{share} less {shown_bytes(total_bytes - free_bytes)} in use"
        )
    room = cpu_room()
    if num_sharers > 1:
        room = part_of(room, num_sharers, held_by_engines())
    return Room(int(room.num_bytes * CPU_SHARE), f"{CPU_SHARE:.0%} of {room.source}")


@dataclass(slots=True, frozen=True)
class Held:
    """Bytes of memory that this engine holds, and those that it shares with hold."""

    own: int
    others: int


def part_of(room: Room, num_sharers: int, held: Held) -> Room:
    """An equal part of what is available and of what the engines hold already, less its own.

    So a part is the same for those that start together and for one that starts again later,
    whatever the others have written of their pools by then.
    """
    part = (room.num_bytes + held.own + held.others) // num_sharers - held.own
    return Room(max(0, min(room.num_bytes, part)), f"one of {num_sharers} parts of {room.source}")


def held_by_engines(root: Path = Path("/"), pid: int | None = None) -> Held:
    """What this process holds, and its parent's other children of its name. root: of /proc."""
    own_pid = os.getpid() if pid is None else pid
    own = _status(root, own_pid)
    others = 0
    for folder in (root / "proc").glob("[0-9]*"):
        status = _status(root, int(folder.name))
        is_sibling = all(status.get(field) == own.get(field) for field in ("PPid", "Name"))
        if is_sibling and int(folder.name) != own_pid:
            others += _held_bytes(status)
    return Held(_held_bytes(own), others)


def _status(root: Path, pid: int) -> dict[str, str]:
    """The fields of a process's status, empty for one that has gone."""
    try:
        lines = (root / f"proc/{pid}/status").read_text("utf-8", "replace").splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _held_bytes(status: Mapping[str, str]) -> int:
    """Memory that is not a file's pages, which go when memory is asked for."""
    return int(status.get("RssAnon", "0 kB").split()[0]) * 1024


def cpu_room(root: Path = Path("/")) -> Room:
    """The memory that can be had without swapping. root: where /proc and /sys are found."""
    rooms = [_machine_room(root), *_group_rooms(root)]
    return min(rooms, key=lambda room: room.num_bytes)


def _machine_room(root: Path) -> Room:
    try:
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                num_bytes = int(line.split()[1]) * 1024
                return Room(num_bytes, f"{shown_bytes(num_bytes)} available")
    except (OSError, ValueError, IndexError):
        pass
    num_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return Room(num_bytes, f"{shown_bytes(num_bytes)} free")


def _group_rooms(root: Path) -> Iterator[Room]:
    """What each control group around this process leaves, of either version; none without one."""
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
            if (room := _left(folder, names)) is not None:
                yield room


@dataclass(slots=True, frozen=True)
class _Files:
    """One version's files in a group's folder; the prefix of its counters over all children."""

    limit: str
    usage: str
    prefix: str


_VERSION_1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_VERSION_2 = _Files("memory.max", "memory.current", "")


def _with_parents(base: Path, path: str) -> Iterator[Path]:
    """The group's folder and those above it; in a container `base` itself is the group's."""
    folder = base / path.strip("/")
    while folder != base:
        yield folder
        folder = folder.parent
    yield base


def _left(folder: Path, files: _Files) -> Room | None:
    """The group's limit less what is in use and cannot be dropped; None where nothing limits."""
    limit = _number(folder / files.limit)
    if limit is None or limit >= _NO_LIMIT:
        return None
    used = _number(folder / files.usage) or 0
    cached = _cached_bytes(folder / "memory.stat", files.prefix)
    left = max(0, limit - max(0, used - cached))
    return Room(left, f"the {shown_bytes(left)} that a limit of {shown_bytes(limit)} leaves")


def _cached_bytes(file: Path, prefix: str) -> int:
    """Bytes of files' contents, which go when memory is asked for."""
    names = (f"{prefix}inactive_file", f"{prefix}active_file")
    try:
        pairs = [line.split() for line in file.read_text(encoding="ascii").splitlines()]
        return sum(int(pair[1]) for pair in pairs if pair[0] in names)
    except (OSError, ValueError, IndexError):
        return 0


def _number(file: Path) -> int | None:
    """None for a file that is not there or says "max"."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
