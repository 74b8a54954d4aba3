"""What every script here shares: its options, its document, and servers as child processes."""

from __future__ import annotations

import argparse
import contextlib
import json
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlmserve.server.bench.sweep import processor_name

BIN = Path(sys.executable).parent
START_TIMEOUT_S = 300.0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
BUNDLED = "", "checkpoint folder; default: the bundled model"


def arguments(doc: str | None, /, **options: Any) -> argparse.Namespace:
    """Parse the command line; each option is its default, or a default and a help text.

    The default's type is the option's. False makes a flag; a list gives the choices, its first
    entry is the default; `...` makes the option required.
    """
    parser = argparse.ArgumentParser(description=(doc or "").split("\n", 1)[0])
    add_options(parser, **options)
    return parser.parse_args()


def add_options(parser: argparse.ArgumentParser, **options: Any) -> None:
    """Add options to a parser; see `arguments`."""
    for name, value in options.items():
        default, text = value if isinstance(value, tuple) else (value, None)
        kind: dict[str, Any] = {"type": type(default), "default": default}
        if default is ...:
            kind = {"required": True}
        elif default is False:
            kind = {"action": "store_true"}
        elif isinstance(default, list):
            kind = {"choices": default, "default": default[0]}
        parser.add_argument("--" + name.replace("_", "-"), help=text, **kind)


def print_document(args: argparse.Namespace, **figures: Any) -> None:
    """Print the last line of a script: machine, options and figures as one JSON document."""
    print(json.dumps({"machine": machine(), **vars(args), **figures}))


def numbers(text: str) -> list[int]:
    """The whole numbers of a comma-separated option; none for an empty text."""
    return [int(part) for part in text.split(",") if part]


@contextlib.contextmanager
def serving(model: str | None, dtype: str, *options: str, name: str = "bench") -> Iterator[Any]:
    """Serve `model` (None: the bundled model) as `name`; yields the process and its URL."""
    port = free_port()
    command = [str(BIN / "vlmserve"), "serve", *([model] if model else []), "--port", str(port)]
    command += ["--dtype", dtype, "--served-model-name", name, *options]
    url = f"http://127.0.0.1:{port}"
    with running(command, f"{url}/v1/health/ready") as server:
        yield server, url


def free_port() -> int:
    """A port that no process uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(
    command: Sequence[str], ready_url: str, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command from its first 200 on ready_url to the end of the block."""
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


@contextlib.contextmanager
def stopped(pids: Sequence[int]) -> Iterator[None]:
    """Stop these processes while the block runs. They may end in it."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


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


def machine() -> dict[str, object]:
    """The processor, cores, versions, commit and load that belong to a figure."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True)
    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": version("torch"),  # read without the seconds that an import takes
        "transformers": version("transformers"),
        "commit": commit.stdout.strip() or "unknown",
        "command": " ".join(["python", *sys.argv]),
        # which stand before a command, not in it
        "environment": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        "load_average": round(os.getloadavg()[0], 2),
    }
