"""Renders templates in killable child processes.

Owns the children, and what their ends mean. Callers are threads: a call blocks until there is an
answer. A child counts its own processor time, so a busy machine makes no template too slow.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

import msgspec

from ...children.processes import child_environment
from ...children.questions import LENGTH_BYTES, question_frame
from .child import TOO_MUCH_MEMORY, Answer, Question, Rendered

MODULE = "vlmserve.server.prompts.templates.child"
NUM_CHILDREN = 2
TIMEOUT_S = 2.0
START_TIMEOUT_S = 60.0
# Wall time in terms of processor time: beyond it the machine is at fault.
WALL_FACTOR = 15
# Signals that end a child because of the template: its timer, and a failed allocation.
_TOO_SLOW, _OUT_OF_MEMORY = -signal.SIGPROF, -signal.SIGABRT


class LostChildError(Exception):
    """A child ended, or gave no answer in time, through no fault of the template."""


class TemplateError(Exception):
    """The template does not compile, or took too much time or memory."""


class TemplateProcesses:
    """At most NUM_CHILDREN children that render templates, started when they are needed."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        """timeout_s: of processor time, for one question."""
        self._timeout_s = timeout_s
        self._places = threading.BoundedSemaphore(NUM_CHILDREN)
        self._idle: list[subprocess.Popen[bytes]] = []

    def render(self, question: Question) -> Sequence[Rendered]:
        """The renderings. Blocks. Raises TemplateError, or LostChildError."""
        with self._places:
            child = self._take()
            try:
                answer = self._ask(child, question)
            except BaseException:
                end(child)
                raise
            self._idle.append(child)
        if answer.error is not None:
            raise TemplateError(answer.error)
        return answer.renderings

    def close(self) -> None:
        """End the children that are idle."""
        while self._idle:
            end(self._idle.pop())

    def __del__(self) -> None:
        self.close()

    def _take(self) -> subprocess.Popen[bytes]:
        """An idle child that is alive, or a new one."""
        while self._idle:
            child = self._idle.pop()
            if child.poll() is None:
                return child
            end(child)
        return _start()

    def _ask(self, child: subprocess.Popen[bytes], question: Question) -> Answer:
        content = msgspec.json.encode(question)
        try:
            frame = question_frame(content, self._timeout_s)
            return _exchange(child, frame, WALL_FACTOR * self._timeout_s)
        except (OSError, EOFError, msgspec.DecodeError):
            raise self._failure(child) from None

    def _failure(self, child: subprocess.Popen[bytes]) -> Exception:
        """What a child's end means."""
        try:
            exit_code = child.wait(1.0)
        except subprocess.TimeoutExpired:
            return LostChildError("the process that renders the chat template gave no answer")
        if exit_code == _TOO_SLOW:
            return TemplateError(f"the template takes longer than {self._timeout_s:g} s")
        if exit_code == _OUT_OF_MEMORY:
            return TemplateError(TOO_MUCH_MEMORY)
        return LostChildError("the process that renders the chat template ended")


def try_template(source: str, variables: dict[str, Any], timeout_s: float = 1.0) -> Rendered:
    """Compile a template and render it once, in a child that is then ended.

    Raises TemplateError if it does not compile or exceeds its bounds, LostChildError.
    """
    processes = TemplateProcesses(timeout_s)
    question = Question(source, "2024-07-26", "", [variables], 1 << 20)
    try:
        found = processes.render(question)[0]
    finally:
        processes.close()
    if found.error == TOO_MUCH_MEMORY:
        raise TemplateError(found.error)
    return found


def end(child: subprocess.Popen[bytes]) -> None:
    """Kill and reap the process. Does nothing if it has ended."""
    child.kill()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # bytes that the child did not read
                pipe.close()
    child.wait()


def _start() -> subprocess.Popen[bytes]:
    """Start a child and wait until it is ready. Raises LostChildError."""
    command = [sys.executable, "-P", "-W", "ignore", "-m", MODULE, str(os.getpid())]
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=child_environment()
        )
    except OSError as error:
        raise LostChildError(f"no process can be started: {error.strerror}") from error
    try:
        _exchange(child, b"", START_TIMEOUT_S)
    except (OSError, EOFError, msgspec.DecodeError):
        end(child)
        raise LostChildError("the process that renders the chat template did not start") from None
    return child


def _exchange(child: subprocess.Popen[bytes], question: bytes, wall_s: float) -> Answer:
    """Send a question and read the answer; after wall_s the child is killed."""
    assert child.stdin is not None
    assert child.stdout is not None
    timer = threading.Timer(wall_s, child.kill)
    timer.start()
    try:
        child.stdin.write(question)
        child.stdin.flush()
        length = int.from_bytes(_read(child, LENGTH_BYTES), "big")
        return msgspec.json.decode(_read(child, length), type=Answer)
    finally:
        timer.cancel()


def _read(child: subprocess.Popen[bytes], num_bytes: int) -> bytes:
    assert child.stdout is not None
    content = child.stdout.read(num_bytes)
    if len(content) < num_bytes:
        raise EOFError
    return content
