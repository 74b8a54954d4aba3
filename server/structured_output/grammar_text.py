"""Grammars as one text: what a JSON schema, a regex, choices or an EBNF become.

Owns the wrapping and the bounds on what clients send. The text is llguidance's own
format, or `{"gbnf": ...}` for a grammar that has still to be translated, which the
children of `compile_checks.py` do. Nothing is compiled here: a grammar of the right
size may still be wrong. Knows nothing of API fields but the name that an error gives.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from ..errors import BadRequestError
from .json_depth import nests_deeper_than
from .plain_schema import plain_schema
from .regex_dialect import lark_with_ascii_classes

MAX_GRAMMAR_BYTES = 65_536
MAX_CHOICES = 1_024
MAX_SCHEMA_DEPTH = 64

# One blank at most where JSON may have any: a model may else write blanks to its last token.
WHITESPACE = r"[ ]"

# What `<` cannot begin a special token in: strings, comments and regexes of a Lark grammar, as
# llguidance's lexer cuts them, whose regexes may go over the ends of lines. `open`: one that begins
# and has no end. No pattern gives back what it took, so a text is looked through once.
_LARK_TEXT = re.compile(
    r'"(?:\\.|[^"\\\n])*+"|//[^\n]*+|#[^\n]*+|/(?:\\.|[^/\\])++/|(?P<open>["/])'
)
_LARK_START = re.compile(r"(?m)^[^\S\n]*+(?:%llguidance\b|start\s*+(?:\[[^\]\n]*+\]\s*+)?:(?!:))")


def json_schema_grammar(schema: dict[str, Any], field: str = "schema") -> str:
    """The JSON texts that a schema describes.

    Raises BadRequestError, naming `field`, if the schema is too long or too deep.
    """
    if nests_deeper_than(MAX_SCHEMA_DEPTH, schema):
        raise BadRequestError(
            f"{field} is nested more than {MAX_SCHEMA_DEPTH} deep: define parts of it in $defs",
            param=field,
        )
    # Before it is gone through, with room for what changes nothing.
    _check_size(msgspec.json.encode(schema), field, 4 * MAX_GRAMMAR_BYTES)
    plain, _ = plain_schema(schema)
    return _one_grammar("json_schema", with_bounded_blanks(plain, field, field), field)


def with_bounded_blanks(schema: dict[str, Any], name: str, field: str) -> dict[str, Any]:
    """The schema with a bound on blanks, without which a model may write them for ever.

    Raises BadRequestError, calling the schema `name`, if it has the server's own key.
    """
    if "x-guidance" in schema:
        raise BadRequestError(
            f"{name}: x-guidance is the server's own key: leave it out", param=field
        )
    return {"x-guidance": {"whitespace_pattern": WHITESPACE}, **schema}


def json_object_grammar(field: str = "response_format") -> str:
    """Any JSON object."""
    return json_schema_grammar({"type": "object"}, field)


def regex_grammar(regex: str, field: str = "regex") -> str:
    """The texts that a regex matches from their first to their last character."""
    if not regex:
        raise BadRequestError(f"{field} is empty: leave it out", param=field)
    _check_text(regex, field)
    # Translated by `lark_grammar`, like every regex of a grammar.
    return lark_grammar(f"start: /{_in_slashes(regex)}/", field)


def choice_grammar(choices: Sequence[str], field: str = "choice") -> str:
    """One of these texts. Raises BadRequestError where there are none, or too many."""
    if not 1 <= len(choices) <= MAX_CHOICES or not all(choices):
        raise BadRequestError(
            f"{field} has {len(choices):,} choices: send 1 to {MAX_CHOICES:,}, none of them empty",
            param=field,
        )
    for choice in choices:
        _check_text(choice, field)
    # One terminal: the lexer sees a single pattern, not a thousand that compete.
    return lark_grammar("start: CHOICE\nCHOICE: " + " | ".join(map(quoted, choices)), field)


def lark_grammar(text: str, field: str = "grammar") -> str:
    """What a grammar in llguidance's dialect of Lark describes, from its rule `start`.

    Special tokens are refused: text that only looks like one is text.
    """
    _check_text(text, field)
    return _checked_lark_grammar(text, field)


def _checked_lark_grammar(text: str, field: str) -> str:
    if any(part["open"] for part in _LARK_TEXT.finditer(text)):
        raise BadRequestError(f"{field} has a string or a regex without its end", param=field)
    if "<" in _LARK_TEXT.sub("", text):
        raise BadRequestError(
            f"{field} names a special token (<...>), and an answer contains none: quote the text"
            ' if you mean its letters, as in "<b>"',
            param=field,
        )
    return _one_grammar("lark_grammar", lark_with_ascii_classes(text), field)


def ebnf_grammar(text: str, field: str = "grammar") -> str:
    """A grammar in either notation: Lark where it has a rule `start:`, else GBNF from `root`."""
    _check_text(text, field)
    if _LARK_START.search(text):
        return _checked_lark_grammar(text, field)
    return _encoded({"gbnf": text}, field)


def _one_grammar(kind: str, content: object, field: str) -> str:
    return _encoded({"grammars": [{kind: content}]}, field)


def _encoded(grammar: dict[str, Any], field: str) -> str:
    text = msgspec.json.encode(grammar).decode()
    _check_size(text.encode(), field)
    return text


def _check_text(text: str, field: str) -> None:
    if "\0" in text:
        raise BadRequestError(f"{field} contains the character U+0000: remove it", param=field)
    _check_size(text.encode(), field)


def _check_size(text: bytes, field: str, most: int = MAX_GRAMMAR_BYTES) -> None:
    num_bytes = len(text)
    if num_bytes > most:
        raise BadRequestError(
            f"{field} has {num_bytes:,} bytes; the limit is {MAX_GRAMMAR_BYTES:,}: shorten it",
            param=field,
        )


def _in_slashes(regex: str) -> str:
    """The regex as it stands between Lark's slashes: those inside, and line ends, escaped."""
    escapes = {"/": r"\/", "\n": r"\n", "\r": r"\r", "\t": r"\t"}
    # A pair of backslash and character is one thing, so `\/` is not escaped again.
    return re.sub(
        r"\\(.)|[/\n\r\t]",
        lambda found: escapes.get(found[1] or found[0], found[0]),
        regex,
        flags=re.DOTALL,
    )


def quoted(text: str) -> str:
    """The text as a string of Lark, whose escapes are JSON's."""
    return msgspec.json.encode(text).decode()
