"""Servers under test as real processes: started on a free port, ready, ended with their block."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.polling import wait_until

START_TIMEOUT_S = 180.0
FAULTY_SERVER = Path(__file__).parent / "faulty_server.py"
MODEL_NAME = "vlmserve-tiny-vision"
RESERVED: list[socket.socket] = []


@dataclass
class RunningServer:
    """A server under test: its process, its address, and what it wrote to stderr."""

    process: subprocess.Popen | None
    port: int
    log: Path | None
    scheme: str = "http"

    @classmethod
    def elsewhere(cls, url: str) -> RunningServer:
        """A server on loopback that someone else started: to be asked, not to be looked into."""
        address = urllib.parse.urlsplit(url)
        return cls(None, address.port, None, address.scheme)

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def get(self, path: str) -> bytes:
        # A test's own certificate is nobody's.
        tls = ssl._create_unverified_context() if self.scheme == "https" else None
        with urllib.request.urlopen(self.url + path, timeout=30, context=tls) as response:
            return response.read()

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        for line in self.get("/metrics").decode().splitlines():
            if line.split(" ")[0] == name:
                return float(line.split(" ")[1])
        raise KeyError(name)


def free_port() -> int:
    """A port on loopback that no other call gives, in this process or another.

    Its socket stays bound without listening: the kernel gives the port to nobody else, and a
    server that sets SO_REUSEADDR can listen on it all the same.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    RESERVED.append(reserved)
    return reserved.getsockname()[1]


@contextlib.contextmanager
def serving(folder: Path, *options: str, model: str | None = None) -> Iterator[RunningServer]:
    """`vlmserve serve` on a free port until the block ends; ready when the block starts.

    Without a standby engine unless the options ask for one: its imports take seconds of a core.
    """
    port = free_port()
    if "--spare-engine" not in options:
        options = (*options, "--no-spare-engine")
    command = [sys.executable, "-m", "vlmserve.server", "serve", *([model] if model else [])]
    command += ["--port", str(port), *options]
    with running_command(command, port, folder) as server:
        yield server


@contextlib.contextmanager
def running_command(
    command: list[str], port: int, folder: Path, **variables: str
) -> Iterator[RunningServer]:
    """A command that serves on `port`, ready when the block starts, ended with it."""
    log = folder / "server.log"
    with log.open("wb") as err:
        process = subprocess.Popen(command, stdout=err, stderr=err, env=os.environ | variables)
    scheme = "https" if "--tls-certfile" in command else "http"
    server = RunningServer(process, port, log, scheme)
    try:
        assert wait_until(lambda: is_ready(server), START_TIMEOUT_S), log.read_text()
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def is_ready(server: RunningServer) -> bool:
    assert server.process.poll() is None, server.log.read_text()
    try:
        server.get("/v1/health/ready")
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    return True


@dataclass
class FaultyServer(RunningServer):
    """A server whose engine hashes, and fails as `fault` tells it to."""

    fault: Path = Path()

    def suffer(self, what: str) -> None:
        """What happens in every step from now on; empty for nothing. See faulty_engine.py."""
        fresh = self.fault.with_suffix(".new")
        fresh.write_text(what)
        fresh.replace(self.fault)


@contextlib.contextmanager
def faulty_serving(folder: Path, **options) -> Iterator[FaultyServer]:
    """A server whose engine fails on demand, until the block ends; see `faulty_server.py`."""
    port, fault = free_port(), folder / "fault"
    command = [sys.executable, str(FAULTY_SERVER), json.dumps({"port": port, **options})]
    with running_command(command, port, folder, FAULT_FILE=str(fault)) as server:
        yield FaultyServer(server.process, port, server.log, fault=fault)
