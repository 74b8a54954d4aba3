"""How a child process answers questions, within limits of time and memory. Linux only.

    stdin     u64 microseconds of processor time   u32 length   a question
    stdout    u32 length   an answer in JSON; the first when it is ready, then one a question

Integers are big-endian. Owns the frames and the limits: SIGPROF ends the process when it has used
its processor time, however busy the machine is, and an allocation beyond its memory fails. Knows
nothing of what is asked.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
from collections.abc import Callable
from typing import BinaryIO, TypeVar

import msgspec

from ...router.processes.parent_death import limit_address_space

LENGTH_BYTES = 4
_HEAD = struct.Struct(">QI")

Question = TypeVar("Question")


def question_frame(question: bytes, timeout_s: float) -> bytes:
    """What the parent writes to ask. timeout_s: of processor time."""
    return _HEAD.pack(max(1, round(timeout_s * 1e6)), len(question)) + question


def answer_questions(
    decode: Callable[[bytes], Question],
    answer: Callable[[Question], msgspec.Struct],
    ready: msgspec.Struct,
    max_memory_bytes: int,
) -> None:
    """Answer until stdin ends. ready: the first answer. Decoding does not count as time."""
    limit_address_space(max_memory_bytes)
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # Nothing that a library prints may pass for an answer.
    os.dup2(2, 1)
    _write(sink, ready)
    # Its default action ends the process, also inside of a library that checks no flag.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    while len(head := source.read(_HEAD.size)) == _HEAD.size:
        microseconds, length = _HEAD.unpack(head)
        question = decode(source.read(length))
        signal.setitimer(signal.ITIMER_PROF, microseconds / 1e6)
        found = answer(question)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(sink, found)


def _write(sink: BinaryIO, found: msgspec.Struct) -> None:
    content = msgspec.json.encode(found)
    sink.write(len(content).to_bytes(LENGTH_BYTES, "big") + content)
    sink.flush()
