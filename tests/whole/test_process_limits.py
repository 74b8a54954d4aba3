"""Limits of the system on processes and memory: one clear line or a 503, and then whole again.

The limit on processes does not hold for root, so the server runs as another user.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.invariants import CHAT, Standing, assert_error, body_for
from support.running import FAULTY_SERVER, RunningServer, running_command

from server_state import is_ready

NOBODY = "65533"
# It may read every file, as Python may be in root's folder; it has no other right of root's.
READS_ALL = "+dac_override,+dac_read_search"
AS_NOBODY = [
    *(shutil.which("setpriv") or "", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
    *(f"--inh-caps={READS_ALL}", f"--ambient-caps={READS_ALL}"),
]
needs_another_user = pytest.mark.skipif(
    os.geteuid() != 0 or not AS_NOBODY[0], reason="needs root, and setpriv to leave it"
)


@pytest.fixture
def server(unused_port: int, tmp_path: Path) -> Iterator[RunningServer]:
    """A server of another user; images wait 3 s for a decoder at most."""
    options = {"port": unused_port, "supervision": {"has_standby": False, "max_restarts": 100}}
    options["server"] = {"image_deadline_s": 3.0}
    command = [*AS_NOBODY, sys.executable, str(FAULTY_SERVER)]
    command.append(json.dumps(options))
    with running_command(command, unused_port, tmp_path) as running:
        yield running


@contextlib.contextmanager
def without_processes(pid: int) -> Iterator[None]:
    """The process can start no process and no thread within the context."""
    limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
    before = next(line.split()[2] for line in limits if line.startswith("Max processes"))
    _limit(pid, "1")
    try:
        yield
    finally:
        _limit(pid, before)


def _limit(pid: int, num_processes: str) -> None:
    # As the same user: another may not.
    command = [*AS_NOBODY, "prlimit", "--pid", str(pid), f"--nproc={num_processes}:"]
    subprocess.run(command, check=True, timeout=60)


@pytest.mark.slow
@needs_another_user
def test_row_69_without_processes_images_and_grammars_are_refused_and_texts_answered(
    server, wait_for, draw_picture
) -> None:
    standing = Standing(server, is_warm=True)
    image = body_for(CHAT, images=[draw_picture(1).url])
    (worker,) = standing.pids("worker")
    with without_processes(worker):
        for pid in standing.pids("decoder"):
            os.kill(pid, signal.SIGKILL)
        with ThreadPoolExecutor(4) as pool:
            grammar = pool.submit(standing.post, CHAT, body_for(CHAT, guided_regex="[a-z]+"))
            picture = pool.submit(standing.post, CHAT, body_for(CHAT, images=[draw_picture(2).url]))
            assert standing.post(CHAT, body_for(CHAT)).status == 200
            assert_error(grammar.result(), 503)
            assert_error(picture.result(), 503, 504)
        assert "cannot start an image decoder: Resource temporarily" in server.log.read_text()
    assert wait_for(lambda: len(standing.pids("decoder")) == 2)
    assert wait_for(lambda: standing.post(CHAT, image).status == 200)
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
@needs_another_user
def test_row_69_a_child_that_cannot_be_forked_is_started_later(server, wait_for) -> None:
    standing = Standing(server, is_warm=True)
    for kind in ("worker", "engine"):
        with without_processes(server.process.pid):
            known = server.log.read_text().count("the system cannot start it: Resource temporarily")
            os.kill(standing.pids(kind)[0], signal.SIGKILL)
            assert wait_for(
                lambda known=known: (
                    server.log.read_text().count("the system cannot start it: Resource temporarily")
                    > known
                )
            )
        assert wait_for(lambda: is_ready(server.url))
        assert standing.post(CHAT, body_for(CHAT)).status == 200
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["worker", "engine"])
def test_row_69_a_process_that_gets_no_more_memory_hangs_no_request(
    start_faulty_server, wait_for, kind
) -> None:
    """Its address space is limited while it serves: a large request fails, or ends the process."""
    server = start_faulty_server(supervision={"has_standby": False, "max_restarts": 100})
    standing = Standing(server, is_warm=True)
    (pid,) = standing.pids(kind)
    num_pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    limit = num_pages * resource.getpagesize() + 2**20
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
    large = body_for(CHAT, text="word " * 200_000)
    for _ in range(3):
        # Refused as too long, an error of the server, or a connection that its worker's end closes.
        with contextlib.suppress(OSError, http.client.HTTPException):
            assert standing.post(CHAT, large).status in (400, 500, 503)
    assert wait_for(lambda: is_ready(server.url))
    assert standing.post(CHAT, body_for(CHAT)).status == 200
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0


@pytest.mark.slow
def test_row_69_a_start_without_memory_ends_with_one_clear_line(unused_port) -> None:
    """It logged an event with the places of the failed import first."""
    serve = [sys.executable, "-m", "vlmserve.server", "serve", "--port", str(unused_port)]
    command = ["sh", "-c", 'ulimit -v 400000; exec "$@"', "sh", *serve]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: cannot load the model")
    assert "loading the model failed" not in done.stderr
    assert "Traceback" not in done.stderr
