"""`make serve` in a terminal: what Ctrl-C, Ctrl-Z and SIGTERM do to make and to the server.

The server is a script that ends with 0 at SIGINT or SIGTERM, as the real one does (test_stopping).
"""

from __future__ import annotations

import contextlib
import os
import pty
import select
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.polling import FAR_S, wait_until

from server_state import descendants

ROOT = Path(__file__).resolve().parents[2]
SERVER = f"""#!{sys.executable}
import signal, sys
for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, lambda number, frame: (print("drained", number, flush=True), sys.exit(0)))
print("serving", flush=True)
while True:
    signal.pause()
"""
# The parent's `setpgid` comes after the child has executed its command.
LATE_PARENT = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "deploy")!r})
import foreground
setpgid = os.setpgid
def late(pid, group):
    while pid and b"python" in open(f"/proc/{{pid}}/comm", "rb").read():
        pass
    setpgid(pid, group)
os.setpgid = late
sys.exit(foreground.main(["sh", "-c", "echo serving; exit 3"]))
"""
CTRL_C, CTRL_Z = b"\x03", b"\x1a"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make_serve(bin_folder: Path) -> list[str]:
    return ["make", "-s", "-C", str(ROOT), "-o", "setup", "serve", f"BIN={bin_folder}"]


class Terminal:
    """A command as the session of a pseudo-terminal."""

    def __init__(self, command: list[str]) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.execvp(command[0], command)
        self.shown = b""
        self.wait_for(b"serving")

    def wait_for(self, text: bytes, after: bytes = b"") -> None:
        while text not in self.shown[self.shown.find(after) :] or after not in self.shown:
            readable, _, _ = select.select([self._fd], [], [], FAR_S)
            with contextlib.suppress(OSError):  # the other side is closed
                if readable and (piece := os.read(self._fd, 1000)):
                    self.shown += piece
                    continue
            raise AssertionError(self.shown)

    def press(self, key: bytes) -> None:
        os.write(self._fd, key)

    def exit_code(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        for pid in descendants(self.pid):
            os.kill(pid, signal.SIGKILL)
        os.close(self._fd)


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    (tmp_path / "python").symlink_to(sys.executable)
    (tmp_path / "vlmserve").write_text(SERVER)
    (tmp_path / "vlmserve").chmod(0o755)
    return tmp_path


@pytest.fixture
def terminal(bin_folder: Path) -> Iterator[Terminal]:
    with contextlib.closing(Terminal(make_serve(bin_folder))) as terminal:
        yield terminal


def test_row_65_ctrl_c_ends_make_serve_with_0_and_no_error(terminal: Terminal) -> None:
    """make got the SIGINT too, and ended with 130 whatever the server returned."""
    terminal.press(CTRL_C)
    terminal.wait_for(b"drained 2")
    assert terminal.exit_code() == 0
    assert b"***" not in terminal.shown


def test_row_65_ctrl_z_stops_make_and_fg_continues_it(bin_folder: Path) -> None:
    """The terminal's shell is told that its job stopped; the server got the key first."""
    shell = ["sh", "-mc", f"{shlex.join(make_serve(bin_folder))}; echo stopped; fg; echo code $?"]
    with contextlib.closing(Terminal(shell)) as terminal:
        terminal.press(CTRL_Z)
        # fg shows the job that it continues.
        terminal.wait_for(b"serve", after=b"Zstopped")
        assert wait_until(lambda: "T" not in {state_of(pid) for pid in descendants(terminal.pid)})
        terminal.press(CTRL_C)
        terminal.wait_for(b"code 0")


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_row_65_a_server_that_starts_before_its_group_is_set_runs() -> None:
    """The system then refuses the parent's `setpgid`, which the child has called already."""
    with contextlib.closing(Terminal([sys.executable, "-c", LATE_PARENT])) as terminal:
        assert terminal.exit_code() == 3


def test_row_65_sigterm_to_make_stops_the_server_in_order(terminal: Terminal) -> None:
    """make raises SIGTERM again once the server has ended: no makefile can change that."""
    os.kill(terminal.pid, signal.SIGTERM)
    terminal.wait_for(b"drained 15")
    assert terminal.exit_code() == -signal.SIGTERM


def test_row_65_sigterm_to_the_server_ends_make_with_0(terminal: Terminal) -> None:
    os.kill(descendants(terminal.pid)[-1], signal.SIGTERM)
    terminal.wait_for(b"drained 15")
    assert terminal.exit_code() == 0


def test_row_65_without_a_terminal_make_serve_is_the_same(bin_folder: Path) -> None:
    with subprocess.Popen(
        make_serve(bin_folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"serving\n"
        (server,) = descendants(process.pid)
        os.kill(server, signal.SIGINT)
        assert process.stdout.read() == b"drained 2\n"
        assert process.wait(60) == 0
