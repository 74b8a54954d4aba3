"""Starts a server as a child process and waits until it answers; ends it by its id."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vlmserve.server.bench.sweep import processor_name

BIN = Path(sys.executable).parent
START_TIMEOUT_S = 300.0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(
    command: Sequence[str], ready_url: str, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """The command as a child process, from its first 200 on ready_url to the end of the block."""
    child = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        _wait_ready(child, ready_url)
        yield child
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(30)
        if child.poll() is None:
            child.kill()
            child.wait()


def _wait_ready(child: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise RuntimeError(f"{child.args} ended with exit code {child.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise RuntimeError(f"{child.args} did not answer on {url} in {START_TIMEOUT_S:.0f} s")


def vlmserve_command(model: str | None, port: int, dtype: str, *more: str) -> list[str]:
    """The command line that serves `model` (None: the bundled one)."""
    target = [model] if model else []
    return [str(BIN / "vlmserve"), "serve", *target, "--port", str(port), "--dtype", dtype, *more]


def machine() -> dict[str, object]:
    """What a figure must be read with: processor, cores, versions, commit, and what else ran."""
    import torch
    import transformers

    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
        "command": " ".join(["python", *sys.argv]),
        # which stand before a command, not in it
        "environment": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        "load_average": round(os.getloadavg()[0], 2),
    }


def _commit() -> str:
    folder = Path(__file__).parent
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"
