"""What a server under test holds and spends, read from /proc and /metrics."""

from __future__ import annotations

import contextlib
import os
import urllib.error
import urllib.request
from pathlib import Path

GAUGES = (
    "num_requests_running",
    "num_requests_waiting",
    "vlmserve_text_blocks_used",
    "vlmserve_image_blocks_used",
)
ENGINE_NAME = "vlmserve-engine"
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def descendants(pid: int) -> list[int]:
    """All living descendants of a process; zombies are not."""
    found, waiting = [], [pid]
    while waiting:
        parent = waiting.pop()
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                direct = [int(child) for child in task.read_text().split()]
                found += [child for child in direct if is_running(child)]
                waiting += direct
    return found


def is_running(pid: int) -> bool:
    """Whether a process still runs; a zombie that is yet to be reaped does not."""
    fields = _stat_fields(pid)
    return bool(fields) and fields[0] not in "ZX"


def engine_pid(supervisor: int) -> int | None:
    """The engine that runs now, or None between two."""
    for pid in descendants(supervisor):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().strip() == ENGINE_NAME:
                return pid
    return None


def num_descriptors(supervisor: int) -> int:
    """Open descriptors of the server's HTTP workers, by command line."""
    total = 0
    for pid in descendants(supervisor):
        with contextlib.suppress(OSError):
            if b"vlmserve.server.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                total += len(os.listdir(f"/proc/{pid}/fd"))
    return total


def is_ready(url: str) -> bool:
    """Whether /v1/health/ready is 200."""
    try:
        with urllib.request.urlopen(f"{url}/v1/health/ready", timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def gauges(url: str) -> dict[str, float]:
    """The figures that must be 0 where nothing runs."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    figures = dict(line.rsplit(" ", 1) for line in lines if line and line[0] != "#")
    return {name: float(figures[name]) for name in GAUGES}


def process_cpu_seconds(pid: int) -> float:
    """What a process has computed, and those of its children that ended; 0 if it has gone."""
    return sum(int(ticks) for ticks in _stat_fields(pid)[11:15]) / TICKS_PER_S


def _stat_fields(pid: int) -> list[str]:
    """What the kernel tells of a process behind its name; empty if it has gone."""
    try:
        # The name, in brackets, may hold spaces.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def machine_cpu_seconds() -> float:
    """What all processes of the machine have computed, in all cores together."""
    ticks = [int(one) for one in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _idle, _waiting, *interrupts = ticks
    return (user + nice + system + sum(interrupts[:3])) / TICKS_PER_S
