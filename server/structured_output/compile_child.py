"""A process that checks whether a client's grammar compiles, within limits of time and memory.

It answers in the frames of `server/children/questions.py`, first when the tokenizer is read. Owns
the check. Knows nothing of requests. A grammar is as `grammar_text.py` writes it; an answer is
JSON: the grammar ready for the engine, or why it is none.
"""

from __future__ import annotations

import re
import sys
import time

import msgspec
from llguidance.gbnf_to_lark import gbnf_to_lark

from ...models.grammar import Grammars
from ...router.processes.parent_death import die_with_parent
from ..children.questions import answer_questions
from .regex_dialect import lark_with_ascii_classes

MAX_MEMORY_BYTES = 2 << 30
# Of processor time, for the first token: a step of the model waits for it, and its neighbours too.
MAX_MASK_S = 0.25


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
    answer_questions(
        bytes.decode, lambda grammar: judge(grammar, grammars), Verdict(), MAX_MEMORY_BYTES
    )


if __name__ == "__main__":
    main()
