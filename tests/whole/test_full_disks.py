"""Servers whose log, temporary folder or shared memory is full or cannot be written.

The folders are mounted in a namespace of the server's own, so these tests need root or a kernel
that gives namespaces to every user.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from support.invariants import CHAT, PICTURE, Standing, body_for
from support.polling import wait_until
from support.running import FAULTY_SERVER, RunningServer, running_command

from server_state import is_ready

NAMESPACE = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
CAN_MOUNT = subprocess.run(
    [*NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True
).returncode == 0  # fmt: skip
needs_mounts = pytest.mark.skipif(not CAN_MOUNT, reason="this system allows no mounts")


def serve(port: int, *options: str) -> list[str]:
    command = [sys.executable, "-m", "vlmserve.server", "serve", "--port", str(port)]
    return [*command, "--no-spare-engine", *options]


@pytest.mark.slow
def test_row_66_a_server_whose_log_cannot_be_written_serves_and_stops(unused_port) -> None:
    """`vlmserve serve 2>/dev/full` ended with 1, and nothing showed why."""
    with (
        open("/dev/full", "wb") as full,
        subprocess.Popen(serve(unused_port), stderr=full) as process,
    ):
        try:
            server = RunningServer(process, unused_port, Path(os.devnull))
            assert wait_until(lambda: process.poll() is not None or is_ready(server.url))
            assert process.poll() is None
            assert Standing(server).post(CHAT, body_for(CHAT)).status == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


# The server writes to its temporary folder alone, and sees these file systems.
READ_ONLY = """
mount -t tmpfs -o size=1m none "$TMPDIR"
mount -t tmpfs -o ro none /dev/shm
mount -o remount,bind,ro /
"""
NO_FOLDER = READ_ONLY + 'mount -o remount,ro "$TMPDIR"; mount -t tmpfs -o ro none /tmp; cd /; '


def faulty_command(port: int) -> list[str]:
    return [sys.executable, str(FAULTY_SERVER), json.dumps({"port": port})]


def in_namespace(mounts: str, command: list[str]) -> list[str]:
    return [*NAMESPACE, "sh", "-c", f'{mounts}\nexec "$@"', "sh", *command]


def fill(folder: Path) -> None:
    """Take all the room of its file system."""
    with contextlib.suppress(OSError), (folder / "fill").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.slow
@needs_mounts
def test_row_67_a_server_that_can_write_nowhere_serves_and_replaces_a_worker(
    unused_port, tmp_path, wait_for
) -> None:
    """HOME, the model, /dev/shm and the rest are read-only; then the temporary folder is full."""
    command = in_namespace(READ_ONLY, faulty_command(unused_port))
    with (
        # The path of a socket may have 107 bytes, fewer than a test's own folder.
        tempfile.TemporaryDirectory(dir="/tmp") as temporary,
        running_command(command, unused_port, tmp_path, TMPDIR=temporary) as server,
    ):
        standing = Standing(server, is_warm=True)
        body = body_for(CHAT, images=[PICTURE])
        with standing.holds():
            assert standing.post(CHAT, body).status == 200
            fill(Path(f"/proc/{server.process.pid}/root{temporary}"))
            assert standing.post(CHAT, body).status == 200
            (worker,) = standing.pids("worker")
            os.kill(worker, signal.SIGKILL)
            assert wait_for(lambda: standing.pids("worker") not in ([], [worker]))
            assert wait_for(lambda: is_ready(server.url))
            assert standing.post(CHAT, body).status == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
    assert "Traceback" not in server.log.read_text()


@needs_mounts
def test_row_67_a_start_without_any_temporary_folder_is_one_line(unused_port, tmp_path) -> None:
    command = in_namespace(NO_FOLDER, serve(unused_port))
    variables = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120)
    assert done.returncode == 1
    assert "cannot create a temporary folder" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
