"""A process that checks whether a client's grammar compiles, within limits of time and memory.

It answers in the frames of `server/children/questions.py`, first when the tokenizer is read: with
an error if that supports no grammars. Owns the check. Knows nothing of requests. A grammar is as
`grammar_text.py` writes it; an answer is JSON: the grammar ready for the engine, or why it is none.
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
from .reasons import Verdict, plain_reason
from .regex_dialect import lark_with_ascii_classes

MAX_MEMORY_BYTES = 2 << 30
# Of processor time, for the first token: a step of the model waits for it, and its neighbours too.
MAX_MASK_S = 0.25


# A pair of backslash and character is one thing, so that an escaped backslash begins no escape.
_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|x([0-9A-Fa-f]{2})|.)", re.DOTALL)
_ASCII_END, _UNICODE_END = 0x80, 0x110000
_SURROGATES = range(0xD800, 0xE000)


def judge(text: str, grammars: Grammars) -> Verdict:
    """Whether a grammar compiles and starts in time, as in the engine.

    One in GBNF is translated first.
    """
    try:
        raw = msgspec.json.decode(text)
        if gbnf := raw.get("gbnf"):
            lark = gbnf_to_lark(without_long_escapes(gbnf))
            raw = {"grammars": [{"lark_grammar": lark_with_ascii_classes(lark)}]}
            text = msgspec.json.encode(raw).decode()
        matcher = grammars.compile_anew(text)
        start = time.process_time()
        grammars.fill([matcher])
        seconds = time.process_time() - start
    except Exception as problem:  # the translation raises nothing more special
        return Verdict(error=plain_reason(str(problem) or type(problem).__name__))
    if matcher.is_in_dead_end:
        return Verdict(error="it has a dead end at its start: no text can fit it")
    if matcher.has_failed or seconds > MAX_MASK_S:
        return Verdict(error="its first token takes too long to find: simplify it")
    return Verdict(grammar=text)


def without_long_escapes(gbnf: str) -> str:
    """The GBNF with characters instead of `\\u` and `\\U`, which the translation cuts short."""
    return _ESCAPE.sub(_unescaped, gbnf)


def _unescaped(escape: re.Match[str]) -> str:
    digits = escape[1] or escape[2] or escape[3]
    code = int(digits, 16) if digits else -1
    if 0 <= code < _ASCII_END:
        return f"\\x{code:02x}"
    is_character = 0 <= code < _UNICODE_END and code not in _SURROGATES
    return chr(code) if is_character else escape[0]


def main() -> None:
    """Answer until stdin ends."""
    die_with_parent(int(sys.argv[1]))
    grammars = Grammars(sys.argv[2], vocab_size=0)
    answer_questions(
        bytes.decode,
        lambda grammar: judge(grammar, grammars),
        Verdict(error=grammars.unsupported),
        MAX_MEMORY_BYTES,
    )


if __name__ == "__main__":
    main()
