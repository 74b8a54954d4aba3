"""Shared fixtures: a real server as a subprocess, and freshly drawn pictures."""

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
from support.invariants import Standing

from vlmserve.models.bundled.pictures import data_url, draw, random_scene

# Tiny models gain nothing from a second thread, and lose much where another process is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Triton reads it when it is first imported: without a GPU its kernels run in its interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

START_TIMEOUT_S = 180.0
FAULTY_SERVER = Path(__file__).parent / "support" / "faulty_server.py"
MODEL_NAME = "vlmserve-tiny-vision"


@dataclass
class RunningServer:
    """A server under test: its process, its address, and what it wrote to stderr."""

    process: subprocess.Popen
    port: int
    log: Path
    scheme: str = "http"

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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition, timeout_s: float = 30.0) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


@contextlib.contextmanager
def serving(folder: Path, *options: str, model: str | None = None) -> Iterator[RunningServer]:
    """`vlmserve serve` on a free port until the block ends; ready when the block starts."""
    port = free_port()
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
            process.wait(60)
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


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[RunningServer]:
    """The bundled model in float32, shared by all tests that only ask questions."""
    with serving(tmp_path_factory.mktemp("server"), "--dtype", "float32") as running:
        yield running


@pytest.fixture(scope="session")
def session_standing(server) -> Standing:
    return Standing(server)


@pytest.fixture
def standing(session_standing) -> Iterator[Standing]:
    """The shared server with the four standing assertions around the whole test.

    For rows in which the engine must survive. Others make a `Standing` of a server of
    their own and say `holds(same_engine=False)`.
    """
    with session_standing.holds():
        yield session_standing


@pytest.fixture
def start_server(tmp_path):
    """Starts further servers, each ended with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *options, **kw: stack.enter_context(serving(tmp_path, *options, **kw))


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


@pytest.fixture
def start_faulty_server(tmp_path):
    """start_faulty_server(supervision={}, server={}, engine={}) -> FaultyServer."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(faulty_serving(tmp_path, **options))


@pytest.fixture(scope="module")
def start_shared_faulty_server(tmp_path_factory):
    """The same for servers that a module's tests share."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(
            faulty_serving(tmp_path_factory.mktemp("server"), **options)
        )


@pytest.fixture
def unused_port():
    return free_port()


@pytest.fixture
def wait_for():
    return wait_until


@dataclass
class Picture:
    """A scene that no checkpoint was trained on, and its picture as a data URL."""

    scene: object
    url: str


@pytest.fixture
def draw_picture():
    """draw_picture(seed, num_shapes=1, size=(224, 224), fmt="PNG") -> Picture."""

    def make(seed, num_shapes=1, size=(224, 224), fmt="PNG") -> Picture:
        rng = numpy.random.default_rng([20_261_123, seed])
        scene = random_scene(rng, num_shapes=num_shapes, size=size, is_distinct=True)
        return Picture(scene, data_url(draw(scene), fmt))

    return make
