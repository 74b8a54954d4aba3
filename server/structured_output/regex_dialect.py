"""The one dialect of regular expressions that clients may use: `\\d`, `\\w` and `\\s` are ASCII.

Owns the translation into the grammar library's dialect, where these classes are Unicode's. Knows
no field and no grammar but the places of regexes in Lark.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# What each class contains, as the inside of a character class.
_ASCII = {"d": "0-9", "w": "0-9A-Za-z_", "s": r"\x09-\x0D\x20"}
# One token of a regex: a pair of backslash and character, or any other character.
_TOKEN = re.compile(r"\\.|.", re.DOTALL)
# Strings and comments of a Lark grammar, which stay, and its regexes.
_LARK_PART = re.compile(
    r'(?P<other>"(?:\\.|[^"\\\n])*+"|//[^\n]*+|#[^\n]*+)|/(?P<regex>(?:\\.|[^/\\])++)/'
)


def with_ascii_classes(regex: str) -> str:
    """The regex with each `\\d`, `\\D`, `\\w`, `\\W`, `\\s` and `\\S` written as an ASCII class.

    Inside a character class they become nested classes.
    """
    return "".join(_translated(regex))


def lark_with_ascii_classes(text: str) -> str:
    """The Lark grammar with the same change in each of its regexes."""
    return _LARK_PART.sub(
        lambda part: part[0] if part["regex"] is None else f"/{with_ascii_classes(part['regex'])}/",
        text,
    )


def _translated(regex: str) -> Iterator[str]:
    for token in _TOKEN.findall(regex):
        kind = token[1:]
        if token[0] == "\\" and kind.lower() in _ASCII:
            negation = "^" if kind.isupper() else ""
            yield f"[{negation}{_ASCII[kind.lower()]}]"
        else:
            yield token
