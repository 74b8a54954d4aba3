"""How much memory of a device this process may use, and where that limit comes from.

Reads /proc/meminfo, control groups of both versions, and CUDA.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..settings.byte_text import shown_bytes

# the rest of a CPU's memory is for HTTP workers, image decoders and other programs
CPU_SHARE = 0.8
# control groups write "no limit" as a number near 2**63
_NO_LIMIT = 1 << 60


@dataclass(slots=True, frozen=True)
class AvailableMemory:
    """Bytes that this process may still take of a device; source: the reading, for messages."""

    num_bytes: int
    source: str


# a device -> its available memory now; tests pass their own
AvailableMemoryOf = Callable[[torch.device], AvailableMemory]


def available_memory(
    device: torch.device, gpu_memory_utilization: float, num_sharers: int = 1
) -> AvailableMemory:
    """The memory that may be taken of a device now.

    A GPU: that share of its memory, minus what all processes use. A CPU: CPU_SHARE of the memory
    that the machine and the control groups leave. num_sharers: engines that share the CPU; the
    result is one engine's part.
    """
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        used_bytes = total_bytes - free_bytes
        num_bytes = max(0, int(total_bytes * gpu_memory_utilization) - used_bytes)
        limit = f"{gpu_memory_utilization:.0%} of {shown_bytes(total_bytes)}"
        return AvailableMemory(num_bytes, f"{limit} less {shown_bytes(used_bytes)} in use")
    memory = available_cpu_memory()
    if num_sharers > 1:
        memory = equal_part(memory, num_sharers, memory_of_engines())
    return AvailableMemory(int(memory.num_bytes * CPU_SHARE), f"{CPU_SHARE:.0%} of {memory.source}")


@dataclass(slots=True, frozen=True)
class EngineMemory:
    """Bytes of memory in use by this engine (own) and by the engines that it shares with."""

    own: int
    others: int


def equal_part(memory: AvailableMemory, num_sharers: int, used: EngineMemory) -> AvailableMemory:
    """An equal part of the available memory plus what all engines use, minus this one's use.

    So an engine that restarts gets the same part as engines that start together, however much of
    their pools the others have written.
    """
    part = (memory.num_bytes + used.own + used.others) // num_sharers - used.own
    source = f"one of {num_sharers} parts of {memory.source}"
    return AvailableMemory(max(0, min(memory.num_bytes, part)), source)


def memory_of_engines(root: Path = Path("/"), pid: int | None = None) -> EngineMemory:
    """The memory of this process, and of its siblings with the same name. root: of /proc."""
    own_pid = os.getpid() if pid is None else pid
    own = _status(root, own_pid)
    others = 0
    for folder in (root / "proc").glob("[0-9]*"):
        status = _status(root, int(folder.name))
        is_sibling = all(status.get(field) == own.get(field) for field in ("PPid", "Name"))
        if is_sibling and int(folder.name) != own_pid:
            others += _anonymous_bytes(status)
    return EngineMemory(_anonymous_bytes(own), others)


def _status(root: Path, pid: int) -> dict[str, str]:
    """The fields of a process's status; empty for a process that has ended."""
    try:
        lines = (root / f"proc/{pid}/status").read_text("utf-8", "replace").splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _anonymous_bytes(status: Mapping[str, str]) -> int:
    """Memory other than file pages, which the system drops when memory is needed."""
    return int(status.get("RssAnon", "0 kB").split()[0]) * 1024


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
