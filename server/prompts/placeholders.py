"""Replaces each user text with an unguessable word, and finds the words again.

Keeps the text of users apart from the text of a template, also inside JSON. Knows nothing of
messages or templates.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from typing import Any

# No name of a special token is one word, so a template may see such texts as they are.
_WORD = re.compile(r"[A-Za-z0-9_-]*")


@dataclass(slots=True, frozen=True)
class RenderedPiece:
    """A part of a prompt. is_template: names of special tokens in it become such tokens."""

    text: str
    is_template: bool


class LostTextError(Exception):
    """A text that must occur once, in order, did not."""


class Sentinels:
    """The words of one rendering.

    Letters and digits only, so that no filter of a template changes them. `tojson` marks
    a word, so that its text is escaped for JSON.
    """

    _NONCE = secrets.token_hex(16)
    _PLAIN = re.compile(f"s{_NONCE}x([0-9]+)e")
    _RAW = re.compile(f'"(s{_NONCE}r[0-9]+e)"')
    _ANY = re.compile(f"s{_NONCE}([xjr])([0-9]+)e")

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._required: list[int] = []

    def hide(self, text: str) -> str:
        """The word for a text that must occur once, in order; an empty text needs none."""
        if not text:
            return ""
        self._required.append(len(self._texts))
        return self._word(text)

    def hide_raw(self, text: str) -> str:
        """The word for a text that `tojson` writes as it stands, without quotes."""
        return self._word(text, "r")

    def hide_all(self, value: Any) -> Any:
        """A JSON value with a word for each string and key; they may occur in any order."""
        if isinstance(value, str):
            return value if _WORD.fullmatch(value) else self._word(value)
        if isinstance(value, list):
            return [self.hide_all(item) for item in value]
        if isinstance(value, dict):
            return {self.hide_all(key): self.hide_all(item) for key, item in value.items()}
        return value

    @classmethod
    def tojson(cls, value: Any, indent: int | None = None, **options: Any) -> str:
        """The filter `tojson` as transformers defines it: nothing is escaped for HTML."""
        options = {"ensure_ascii": False, **options}
        text = cls._RAW.sub(r"\1", json.dumps(value, indent=indent, **options))
        return cls._PLAIN.sub(rf"s{cls._NONCE}j\1e", text)

    def split(self, rendered: str) -> list[RenderedPiece]:
        """The rendered text in pieces, with the users' texts back in place.

        Raises LostTextError.
        """
        parts = self._ANY.split(rendered)
        pieces = [RenderedPiece(parts[0], is_template=True)]
        found: list[int] = []
        required = set(self._required)
        for kind, number, following in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
            index = int(number)
            found += [index] if index in required else []
            pieces.append(RenderedPiece(self._text(kind, index), is_template=False))
            pieces.append(RenderedPiece(following, is_template=True))
        if found != self._required:
            raise LostTextError("the template lost, doubled or moved a text")
        return [piece for piece in pieces if piece.text]

    def _word(self, text: str, kind: str = "x") -> str:
        self._texts.append(text)
        return f"s{self._NONCE}{kind}{len(self._texts) - 1}e"

    def _text(self, kind: str, index: int) -> str:
        text = self._texts[index]
        return json.dumps(text, ensure_ascii=False)[1:-1] if kind == "j" else text
