"""How much memory of a device this process may use, and where that limit comes from.

Reads CUDA and the other engines; `host_memory.py` reads the machine and its control groups.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..settings.byte_text import shown_bytes
from .host_memory import AvailableMemory, available_cpu_memory

# the rest of a CPU's memory is for HTTP workers, image decoders and other programs
CPU_SHARE = 0.8


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
