"""A process that renders chat templates, within limits of time and memory.

    stdin     u64 microseconds of processor time   u32 length   a question in JSON
    stdout    u32 length   an answer in JSON; the first when it is ready, then one a question

Integers are big-endian. Owns the rendering and its limits: SIGPROF ends the process when it has
used its processor time, however busy the machine is, and an allocation beyond MAX_MEMORY_BYTES
fails. Knows nothing of requests. Template and variables come with each question.
"""

from __future__ import annotations

import datetime
import functools
import os
import signal
import struct
import sys
from typing import Any, BinaryIO

import msgspec
from jinja2 import Template

from ....router.processes.parent_death import die_with_parent, limit_address_space
from .environment import make_environment, reason_of, render

MAX_MEMORY_BYTES = 1 << 30
LENGTH_BYTES = 4
QUESTION_HEAD = struct.Struct(">QI")
TOO_MUCH_MEMORY = "the template takes too much memory"


class Question(msgspec.Struct, frozen=True):
    """What to render: a template with each of the variables.

    now: the time that the template may ask for, in ISO's form. nonce: that of placeholders in the
    variables.
    """

    source: str
    now: str
    nonce: str
    variables: list[dict[str, Any]]
    max_chars: int


class Rendered(msgspec.Struct, frozen=True):
    """One rendering. Exactly one is set: the text, or the reason against it."""

    text: str | None = None
    error: str | None = None


class Answer(msgspec.Struct, frozen=True):
    """The renderings, in the order of the variables; or why the template does not compile."""

    renderings: list[Rendered] = []
    error: str | None = None


class Clock:
    """The time that templates see."""

    def __init__(self) -> None:
        self.now = datetime.datetime.now()

    def read(self) -> datetime.datetime:
        """The time that was set last."""
        return self.now


@functools.lru_cache(4)
def _compiled(source: str, nonce: str, clock: Clock) -> Template:
    return make_environment(clock.read, nonce).from_string(source)


def answer(question: Question, clock: Clock) -> Answer:
    """Everything that is asked for."""
    clock.now = datetime.datetime.fromisoformat(question.now)
    try:
        template = _compiled(question.source, question.nonce, clock)
    except MemoryError:
        return Answer(error=TOO_MUCH_MEMORY)
    except Exception as error:
        return Answer(error=reason_of(error))
    return Answer([_rendered(template, one, question.max_chars) for one in question.variables])


def _rendered(template: Template, variables: dict[str, Any], max_chars: int) -> Rendered:
    try:
        return Rendered(render(template, variables, max_chars))
    except MemoryError:
        return Rendered(error=TOO_MUCH_MEMORY)
    except Exception as error:
        # A template is a program of the checkpoint's: it may fail in any way.
        return Rendered(error=reason_of(error))


def main() -> None:
    """Answer until stdin ends."""
    die_with_parent(int(sys.argv[1]))
    limit_address_space(MAX_MEMORY_BYTES)
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _write(sink, Answer())
    # Its default action ends the process, also inside of a library that checks no flag.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    clock = Clock()
    while len(head := source.read(QUESTION_HEAD.size)) == QUESTION_HEAD.size:
        microseconds, length = QUESTION_HEAD.unpack(head)
        question = msgspec.json.decode(source.read(length), type=Question)
        signal.setitimer(signal.ITIMER_PROF, microseconds / 1e6)
        found = answer(question, clock)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(sink, found)


def _write(sink: BinaryIO, found: Answer) -> None:
    content = msgspec.json.encode(found)
    sink.write(len(content).to_bytes(LENGTH_BYTES, "big") + content)
    sink.flush()


if __name__ == "__main__":
    main()
