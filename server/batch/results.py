"""The output of a batch: one line for each request, in the order in which they end.

Owns the file. A line is written whole, by one system call, so a run that is killed leaves at most
one partial line, which the next run removes. Knows nothing of requests.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from pathlib import Path
from typing import Any

import msgspec
import orjson

from .requests import BatchError


class _Done(msgspec.Struct):
    custom_id: str


class Results:
    """Opens the output to append to it. done: the custom_ids of the lines that it has already."""

    def __init__(self, file: Path) -> None:
        """Raises BatchError if the file cannot be used, or another run writes to it."""
        self._file = file
        try:
            self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BatchError(f"another run writes to {file}: wait for it, or end it") from error
        except OSError as error:
            raise BatchError(f"{file} cannot be written: {error.strerror}") from error
        self.done = self._read_done()

    def _read_done(self) -> set[str]:
        """Remove a partial last line, and read the others. Raises BatchError."""
        done: set[str] = set()
        end = 0
        with self._file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                try:
                    done.add(msgspec.json.decode(line, type=_Done).custom_id)
                except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                    raise BatchError(
                        f"line {number} of {self._file} is no result of a batch: name another file"
                    ) from error
        os.ftruncate(self._descriptor, end)
        return done

    def write(
        self,
        custom_id: str,
        response: dict[str, Any] | None,
        error: dict[str, Any] | None = None,
    ) -> None:
        """Append one line. Raises BatchError if the disk is full."""
        line = orjson.dumps(
            {
                "id": f"batch_req_{uuid.uuid4().hex}",
                "custom_id": custom_id,
                "response": response,
                "error": error,
            },
            option=orjson.OPT_APPEND_NEWLINE,
        )
        try:
            if os.write(self._descriptor, line) != len(line):
                raise BatchError(f"{self._file} cannot be written to its end: is the disk full?")
        except OSError as failure:
            raise BatchError(f"{self._file} cannot be written: {failure.strerror}") from failure

    def close(self) -> None:
        os.close(self._descriptor)
