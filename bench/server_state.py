"""Reads what a server under test uses: its processes, descriptors, CPU time and metrics."""

from __future__ import annotations

import contextlib
import urllib.error
import urllib.request
from pathlib import Path

import psutil

GAUGES = (
    "num_requests_running",
    "num_requests_waiting",
    "vlmserve_text_blocks_used",
    "vlmserve_image_blocks_used",
)
ENGINE_NAME = "vlmserve-engine"
HTTP_WORKER = "vlmserve.server.worker.process"


def descendants(pid: int) -> list[int]:
    """All living descendants of a process, without zombies.

    Reads only the family's own entries of /proc: psutil reads those of every process of the
    machine, which costs a core where it is asked again and again.
    """
    found: list[int] = []
    parents = [pid]
    while parents:
        for file in Path(f"/proc/{parents.pop()}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                children = [int(child) for child in file.read_text().split()]
                found += children
                parents += children
    return [child for child in found if is_running(child)]


def is_running(pid: int) -> bool:
    """Whether a process still runs; a zombie does not."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return False


def engine_pid(supervisor: int) -> int | None:
    """The pid of the running engine, or None between two engines."""
    for pid in descendants(supervisor):
        with contextlib.suppress(psutil.Error):
            if psutil.Process(pid).name() == ENGINE_NAME:
                return pid
    return None


def num_descriptors(supervisor: int) -> int:
    """Open descriptors of the server's HTTP workers."""
    total = 0
    for pid in worker_pids(supervisor):
        with contextlib.suppress(psutil.Error):
            total += psutil.Process(pid).num_fds()
    return total


def rss_mib(pid: int) -> float:
    """Memory of a process in MiB, without what it shares with files; 0 after it has ended."""
    with contextlib.suppress(psutil.Error):
        memory = psutil.Process(pid).memory_info()
        return round((memory.rss - memory.shared) / 2**20, 1)
    return 0.0


def worker_pids(supervisor: int) -> list[int]:
    """The pids of the server's HTTP workers."""
    found = []
    for pid in descendants(supervisor):
        with contextlib.suppress(psutil.Error):
            if any(HTTP_WORKER in part for part in psutil.Process(pid).cmdline()):
                found.append(pid)
    return found


def worker_rss_mib(supervisor: int) -> float:
    """Memory of the server's HTTP workers in MiB."""
    return sum(map(rss_mib, worker_pids(supervisor)))


def is_ready(url: str) -> bool:
    """Whether /v1/health/ready is 200."""
    try:
        with urllib.request.urlopen(f"{url}/v1/health/ready", timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def metrics(url: str) -> dict[str, float]:
    """The server's metrics; a name with labels includes them."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line and line[0] != "#")
    return {name: float(value) for name, value in pairs}


def gauges(url: str) -> dict[str, float]:
    """The gauges that must be 0 when no request runs."""
    figures = metrics(url)
    return {name: figures[name] for name in GAUGES}


def process_cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and its ended children; 0 after the process has ended."""
    with contextlib.suppress(psutil.Error):
        return sum(psutil.Process(pid).cpu_times()[:4])
    return 0.0


def machine_cpu_seconds() -> float:
    """CPU seconds of all processes of the machine, all cores together."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)
