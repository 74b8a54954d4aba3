"""A process that compiles strangers' grammars to say whether they can be: killed at a deadline.

    stdin, stdout    length (4 bytes, big-endian) and that many bytes, an answer for each question

Owns the check and its memory limit. Knows nothing of requests. A question is a grammar as
`grammars.py` writes it; an answer is JSON: the grammar ready for the engine, or why it is none.
"""

from __future__ import annotations

import os
import resource
import sys

import msgspec
from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from ..router.parent import die_with_parent

MAX_MEMORY_BYTES = 2 << 30
LENGTH_BYTES = 4


class Verdict(msgspec.Struct, frozen=True):
    """Exactly one is set: the grammar for the engine, or the reason against it in one line."""

    grammar: str | None = None
    error: str | None = None


def judge(text: str) -> Verdict:
    """Whether a grammar compiles; one in GBNF is translated first."""
    try:
        raw = msgspec.json.decode(text)
        if gbnf := raw.get("gbnf"):
            raw = {"grammars": [{"lark_grammar": any_to_lark(gbnf)}]}
            text = msgspec.json.encode(raw).decode()
        error = LLMatcher.validate_grammar(text)
    except Exception as problem:  # the translation raises nothing more special
        return Verdict(error=_one_line(str(problem) or type(problem).__name__))
    return Verdict(error=_one_line(error)) if _is_error(error) else Verdict(grammar=text)


def _is_error(message: str) -> bool:
    return bool(message) and not message.startswith("WARNING")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def main() -> None:
    """Answer until stdin ends."""
    die_with_parent(int(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # Nothing that a library prints may pass for an answer.
    os.dup2(2, 1)
    while len(head := source.read(LENGTH_BYTES)) == LENGTH_BYTES:
        question = source.read(int.from_bytes(head, "big")).decode()
        answer = msgspec.json.encode(judge(question))
        sink.write(len(answer).to_bytes(LENGTH_BYTES, "big") + answer)
        sink.flush()


if __name__ == "__main__":
    main()
