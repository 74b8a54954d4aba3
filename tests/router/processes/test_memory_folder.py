"""A server's folder in memory: private, removed at the end, and by the next start if it cannot."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from vlmserve.router.processes.memory_folder import NEW_PREFIX, PREFIX, memory_folder

OWNER_CODE = """
import sys, pathlib
from vlmserve.router.processes.memory_folder import memory_folder
with memory_folder(True, pathlib.Path(sys.argv[1])) as path:
    pathlib.Path(path, "image").write_bytes(b"x")
    print(path, flush=True)
    sys.stdin.read()
"""


def server_in(root: Path) -> tuple[subprocess.Popen[str], Path]:
    """Another process with a folder, until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER_CODE, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_folder_is_private_and_gone_at_the_end(tmp_path: Path) -> None:
    with memory_folder(True, tmp_path) as path:
        for folder in (Path(path), Path(path).parent):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        Path(path, "image").write_bytes(b"x")
    assert os.listdir(tmp_path) == []


def test_without_the_option_there_is_none(tmp_path: Path) -> None:
    with memory_folder(False, tmp_path) as path:
        assert path == ""
        assert os.listdir(tmp_path) == []


def test_a_start_removes_the_folders_of_killed_servers_and_no_other(tmp_path: Path) -> None:
    running, kept = server_in(tmp_path)
    killed, left = server_in(tmp_path)
    killed.kill()
    killed.communicate()
    other = tmp_path / f"{PREFIX}not-a-folder"
    other.write_bytes(b"")
    assert left.is_dir()
    with memory_folder(False, tmp_path):
        assert not left.parent.exists()
        assert (kept / "image").exists()
    assert other.exists()
    running.communicate("")
    assert sorted(os.listdir(tmp_path)) == [other.name]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(NEW_PREFIX)]


def test_a_root_that_cannot_be_written_turns_it_off_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with memory_folder(True, tmp_path / "missing") as path:
        assert path == ""
    (line,) = [one for one in capsys.readouterr().err.splitlines() if "image-cache-host" in one]
    assert "No such file or directory" in line
