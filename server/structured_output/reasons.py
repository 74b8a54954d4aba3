"""Why a grammar does not compile, in words that name no part or option of the library.

Owns the translation, and the answer of a check. Knows no field and no grammar.
"""

from __future__ import annotations

import re

import msgspec

MAX_LENGTH = 300

# Patterns of the library's messages, and ours with the parts that they name.
_REASONS = (
    (r"Unimplemented keys: \[(?P<what>.*)\]", "the keywords {what} are not supported: remove them"),
    (r"oneOf constraints", "the branches of a oneOf cannot be distinguished: use anyOf"),
    (r"Unsatisfiable schema: Regex is empty",
     "no JSON fulfils it: pattern, format and lengths of a string exclude each other"),
    (r"Unsatisfiable schema: range .* multiple of (?P<what>\S+)",
     "no JSON fulfils it: no multiple of {what} is between its bounds"),
    (r"Unsatisfiable schema: anyOf is empty",
     "no JSON fulfils it: an enum or anyOf has no possible value"),
    (r"Unsatisfiable schema: incompatible types",
     "no JSON fulfils it: types, values or constraints exclude each other"),
    (r"Unsatisfiable schema: required (?P<what>.*) is unsatisfiable",
     "no JSON fulfils it: the required {what} has no possible value"),
    (r"Unsatisfiable schema: (?P<what>.*)", "no JSON fulfils it: {what}"),
    (r"min/maxProperties only", "minProperties and maxProperties need all properties in required"),
    (r"Pointer (?P<what>'.*') does not exist", "the $ref {what} points to nothing"),
    (r"Resource (?P<what>'.*?') is not present|Invalid URI reference (?P<bad>'.*?')",
     "a $ref must start with #/ and name a part of the schema itself, such as #/$defs/name"),
    (r"circular references with sibling keys",
     "a $ref to a schema around it has keywords beside it: remove them"),
    (r"Invalid type: (?P<what>.*)",
     "{what} is not a type: use string, number, integer, boolean, object, array or null"),
    (r"invalid multiple of", "multipleOf must be a number over 0"),
    (r"Expected positive integer for (?P<key>'\w+'), got (?P<what>.*)",
     "{key} must be an integer from 0, not {what}"),
    (r"Expected f64 for (?P<key>'\w+'), got (?P<what>.*)", "{key} must be a number, not {what}"),
    (r"Expected (?P<kind>\w+) for (?P<key>'\w+')(?: item)?, got (?P<what>.*)",
     "{key} must be of the type {kind}, not {what}"),
    (r"look-around|lookaround",
     "look-around in regular expressions is not supported: write the pattern without it"),
    (r"backreference",
     "back-references in regular expressions are not supported: write the pattern without them"),
    (r"regex parse error.* error: (?P<what>.*?)(?: \d+ \| |$)",
     "a regular expression is invalid: {what}"),
    (r"regex parse error|invalid regex",
     "a regular expression is invalid: check its brackets and escapes"),
    (r"(?:too big|size limit)", "a regular expression is too large: lower its counts and lengths"),
)  # fmt: skip
# The place in a grammar, and its lines around the place.
_EXCERPT = re.compile(r" \d+ \| .*")


class Verdict(msgspec.Struct, frozen=True):
    """The grammar for the engine, or the reason against it in one line."""

    grammar: str | None = None
    error: str | None = None


def plain_reason(message: str) -> str:
    """One line that says what is wrong."""
    reason = " ".join(message.split())
    for pattern, words in _REASONS:
        if found := re.search(pattern, reason):
            return words.format(**found.groupdict())[:MAX_LENGTH]
    return _EXCERPT.sub("", reason)[:MAX_LENGTH]
