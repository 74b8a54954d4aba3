"""A log that cannot be written: lines are lost, and nothing else."""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from vlmserve.router.processes import log_stream, logs
from vlmserve.router.processes.log_stream import LogStream

LINE = "x" * 99 + "\n"
PIPE_BYTES = 1 << 16


@pytest.fixture
def pipe() -> Iterator[list[int]]:
    """[the end that is read, the end that is written]"""
    ends = list(os.pipe())
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    yield ends
    for end in ends:
        os.close(end)


def test_row_66_a_full_disk_loses_lines_and_raises_nothing() -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        stream = LogStream(full.fileno())
        assert [stream.write(LINE) for _ in range(3)] == [len(LINE)] * 3
        assert stream.take_num_lost() == 0, "not before a line can be written again"


def test_row_66_a_reader_that_does_not_read_loses_lines_until_it_does(pipe, monkeypatch) -> None:
    """A write waited for ever: the event loop stood, and the supervisor ended the worker."""
    monkeypatch.setattr(log_stream, "PATIENCE_MS", 1)
    stream = LogStream(pipe[1])
    for _ in range(1_000):
        stream.write(LINE)
    written = os.read(pipe[0], PIPE_BYTES)
    assert written == LINE.encode() * (len(written) // 100)
    assert stream.take_num_lost() == 0
    stream.write("again\n")
    assert stream.take_num_lost() == 1_000 - len(written) // 100
    assert stream.take_num_lost() == 0
    assert os.read(pipe[0], PIPE_BYTES) == b"again\n"


def test_row_66_a_reader_that_has_gone_loses_lines(pipe) -> None:
    os.close(pipe[0])
    LogStream(pipe[1]).write(LINE)
    pipe[0] = os.open("/dev/null", os.O_RDONLY)


def test_row_66_the_log_reports_how_many_lines_were_lost(pipe, monkeypatch) -> None:
    stream = LogStream(pipe[1])
    monkeypatch.setattr(logs, "STREAM", stream)
    handler = logs.LogHandler(stream)
    handler.setFormatter(logs.EventFormatter("text", "worker"))
    logger = logging.getLogger("vlmserve.log")
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "propagate", False)
    stream._num_lost = 7
    logger.warning("disk has room again")
    first, second = os.read(pipe[0], PIPE_BYTES).decode().splitlines()
    assert first.endswith("disk has room again")
    assert second.endswith("warning worker vlmserve.log: 7 lines of this log were lost")


@pytest.mark.parametrize("form", ["text", "json"])
def test_row_66_a_process_without_a_log_ends_with_its_own_exit_code(form) -> None:
    """Python ends with 120 if a buffer of stderr cannot be written at the end."""
    code = f"""
import logging, sys
from vlmserve.router.processes.logs import say, set_up_logging
set_up_logging("info", {form!r}, "worker")
say("a line")
logging.error("another")
print("a stray one", file=sys.stderr)
sys.exit(5)
"""
    with open("/dev/full", "wb") as full:
        assert subprocess.run([sys.executable, "-c", code], stderr=full, timeout=60).returncode == 5
