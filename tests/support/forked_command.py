"""Runs the command line in a fork of the tests' process, where its modules are imported already.

Starting Python and importing the command line takes a second of a core, and a start that fails
needs nothing else. That the command starts as users start it is tested with a new process.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlmserve.server.cli import main as cli

FAILED = 70
# Then the child ends: a command that serves would never.
TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class Done:
    """What a command ended with, and what it wrote to stdout and stderr."""

    returncode: int
    stdout: str
    stderr: str


def run_forked(arguments: Sequence[str], variables: Mapping[str, str] | None = None) -> Done:
    """`vlmserve ARGUMENTS`, with these variables beside those of the environment."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with warnings.catch_warnings():
            # The threads of this process are those of pytest's: they have no lock of the command's.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            signal.alarm(TIMEOUT_S)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os._exit(_exit_code(arguments, variables or {}))
        _, status = os.waitpid(pid, 0)
        texts = [_text_of(file.fileno()) for file in (out, err)]
    return Done(os.waitstatus_to_exitcode(status), *texts)


def _exit_code(arguments: Sequence[str], variables: Mapping[str, str]) -> int:
    """In the child: it writes to the files that are open as stdout and stderr."""
    os.environ.update(variables)
    sys.argv = ["vlmserve", *arguments]
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    try:
        cli.main()
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return FAILED
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _text_of(file: int) -> str:
    os.lseek(file, 0, os.SEEK_SET)
    with os.fdopen(file, "r", encoding="utf-8", closefd=False) as text:
        return text.read()
