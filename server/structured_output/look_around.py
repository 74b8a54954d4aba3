"""Look-around in the patterns of schemas: what of it a grammar can obey.

Grammars have no look-around, and zod and pydantic write it (emails, durations, decimals). Owns the
rewriting. Without a look-around a pattern matches more texts, never fewer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_STARTS = ("(?=", "(?!", "(?<=", "(?<!")
# One token of a regex: an escaped character, a class, the start of a look-around, or a character.
# A class without an end goes to the end of the text, so that the text is looked through once.
_TOKEN = re.compile(r"\\.|\[\^?+\]?+(?:\\.|[^\]])*+(?:\]|\Z)|\(\?(?:<?[=!])|.", re.DOTALL)
# Pydantic's pattern of decimal numbers, and the same without look-around.
_EQUIVALENTS = {
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$": r"^[+-]?(\d+\.?\d*|\.\d+)$",
}


@dataclass(slots=True, frozen=True)
class PlainPattern:
    """A pattern without look-around. others: patterns that the text matches too.

    is_weaker: all of them together match texts that the original does not.
    """

    pattern: str
    others: tuple[str, ...] = ()
    is_weaker: bool = False


def without_look_around(pattern: str) -> PlainPattern:
    """The pattern without look-around.

    Look-aheads behind a `^` at the start become patterns of their own; all others are left out.
    """
    if pattern in _EQUIVALENTS:
        return PlainPattern(_EQUIVALENTS[pattern])
    if not any(start in pattern for start in _STARTS):
        return PlainPattern(pattern)
    tokens = _TOKEN.findall(pattern)
    others: list[str] = []
    if tokens[0] == "^" and "|" not in _outside_groups(tokens):
        tokens, others = _split_start(tokens)
    kept = "".join(_kept(tokens))
    plain = tuple("".join(_kept(_TOKEN.findall(other))) for other in others)
    is_weaker = kept != "".join(tokens) or list(plain) != others
    return PlainPattern(kept, plain, is_weaker)


def _split_start(tokens: list[str]) -> tuple[list[str], list[str]]:
    """The tokens without the positive look-aheads behind the first `^`, and these as patterns."""
    others = []
    at = 1
    while at < len(tokens) and tokens[at] == "(?=":
        end = _end_of_group(tokens, at)
        others.append("^(?:" + "".join(tokens[at + 1 : end]) + ")")
        at = end + 1
    return [tokens[0], *tokens[at:]], others


def _kept(tokens: list[str]) -> Iterator[str]:
    """The tokens outside look-around."""
    at = 0
    while at < len(tokens):
        if tokens[at] in _STARTS:
            at = _end_of_group(tokens, at)
        else:
            yield tokens[at]
        at += 1


def _end_of_group(tokens: list[str], start: int) -> int:
    """The index of the bracket that closes the group at `start`; the last index without one."""
    depth = 0
    for at in range(start, len(tokens)):
        depth += tokens[at].startswith("(") - (tokens[at] == ")")
        if depth == 0:
            return at
    return len(tokens) - 1


def _outside_groups(tokens: list[str]) -> list[str]:
    outside, depth = [], 0
    for token in tokens:
        depth += token.startswith("(")
        if depth == 0:
            outside.append(token)
        depth -= token == ")"
    return outside
