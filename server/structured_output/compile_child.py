"""A process that checks whether a client's grammar compiles, within limits of time and memory.

    stdin     u64 microseconds of processor time   u32 length   the grammar
    stdout    u32 length   an answer; the first when the tokenizer is read, then one a grammar

Integers are big-endian. Owns the check and its limits: SIGPROF ends the process when it has used
its processor time, however busy the machine is, and an allocation beyond MAX_MEMORY_BYTES fails.
Knows nothing of requests. A grammar is as `grammar_text.py` writes it; an answer is JSON: the
grammar ready for the engine, or why it is none.
"""

from __future__ import annotations

import os
import re
import signal
import struct
import sys
import time
from typing import BinaryIO

import msgspec
from llguidance.gbnf_to_lark import gbnf_to_lark

from ...models.grammar import Grammars
from ...router.processes.parent_death import die_with_parent, limit_address_space
from .regex_dialect import lark_with_ascii_classes

MAX_MEMORY_BYTES = 2 << 30
# Of processor time, for the first token: a step of the model waits for it, and its neighbours too.
MAX_MASK_S = 0.25
LENGTH_BYTES = 4
QUESTION_HEAD = struct.Struct(">QI")


class Verdict(msgspec.Struct, frozen=True):
    """Exactly one is set: the grammar for the engine, or the reason against it in one line."""

    grammar: str | None = None
    error: str | None = None


def judge(text: str, grammars: Grammars) -> Verdict:
    """Whether a grammar compiles and starts in time, as in the engine.

    One in GBNF is translated first.
    """
    try:
        raw = msgspec.json.decode(text)
        if gbnf := raw.get("gbnf"):
            raw = {"grammars": [{"lark_grammar": lark_with_ascii_classes(gbnf_to_lark(gbnf))}]}
            text = msgspec.json.encode(raw).decode()
        matcher = grammars.compile_anew(text)
        start = time.process_time()
        grammars.fill([matcher])
        seconds = time.process_time() - start
    except Exception as problem:  # the translation raises nothing more special
        reason = _one_line(str(problem) or type(problem).__name__)
        is_schema = '"json_schema"' in text or "%json" in text
        return Verdict(error=_plain_reason(reason) if is_schema else reason)
    if matcher.is_in_dead_end:
        return Verdict(error="it has a dead end at its start: no text can fit it")
    if matcher.has_failed or seconds > MAX_MASK_S:
        return Verdict(error="its first token takes too long to find: simplify it")
    return Verdict(grammar=text)


# The library's words for a JSON schema that it cannot obey, and ours.
_PLAIN_REASONS = (
    (r"Unimplemented keys: \[(?P<what>.*)\]", "the keywords {what} are not supported: remove them"),
    (r"oneOf constraints", "the branches of a oneOf cannot be distinguished: use anyOf"),
    (r"Unsatisfiable schema: (?P<what>.*)", "no JSON fulfils it: {what}"),
    (r"min/maxProperties only", "minProperties and maxProperties need all properties in required"),
    (r"Pointer (?P<what>'.*') does not exist", "the $ref {what} points to nothing"),
    (r"regex parse error|look-around|backreference", "a pattern is not a supported regular"
     " expression: look-around and back-references are not supported"),
)  # fmt: skip


def _plain_reason(reason: str) -> str:
    """The reason against a JSON schema in words that name no option of the library."""
    for pattern, words in _PLAIN_REASONS:
        if found := re.search(pattern, reason):
            return words.format(**found.groupdict())
    return reason


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def main() -> None:
    """Answer until stdin ends."""
    die_with_parent(int(sys.argv[1]))
    grammars = Grammars(sys.argv[2], vocab_size=0)
    limit_address_space(MAX_MEMORY_BYTES)
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # Nothing that a library prints may pass for an answer.
    os.dup2(2, 1)
    _write(sink, Verdict())
    # Its default action ends the process, also inside of a library that checks no flag.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    while len(head := source.read(QUESTION_HEAD.size)) == QUESTION_HEAD.size:
        microseconds, length = QUESTION_HEAD.unpack(head)
        question = source.read(length).decode()
        signal.setitimer(signal.ITIMER_PROF, microseconds / 1e6)
        verdict = judge(question, grammars)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(sink, verdict)


def _write(sink: BinaryIO, verdict: Verdict) -> None:
    answer = msgspec.json.encode(verdict)
    sink.write(len(answer).to_bytes(LENGTH_BYTES, "big") + answer)
    sink.flush()


if __name__ == "__main__":
    main()
