"""Keeps the texts of clients apart from the text of a template.

Owns three ways to hand texts to a template. `Placeholders` puts an unguessable word in the place of
each text, with the text's own white space around it. `RealTexts` hands them over as they are, which
shows what the template makes of them. `MaskedTexts` changes only what could become a part of a
special token. Knows nothing of messages or templates.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

# No name of a special token is one word, so a template may see such texts as they are.
_WORD = re.compile(r"[A-Za-z0-9_-]*")
NONCE = secrets.token_hex(16)
_ANY = re.compile(f"s{NONCE}([xjri])([0-9]+)e")
# Without regard to case: a template may have changed it.
_TRACE = re.compile(f"s{NONCE}[xjr]([0-9]+)e", re.IGNORECASE)
# The end of a text that the model is to continue; then a blank, which a template may trim.
_END = f"s{NONCE}te"
# The first of the characters that stand for masked ones: a plane for private use.
_FIRST_MASK = 0xF0000


@dataclass(slots=True, frozen=True)
class RenderedPiece:
    """A part of a prompt. is_template: names of special tokens in it become such tokens."""

    text: str
    is_template: bool


class LostTextError(Exception):
    """The template left out a text, doubled it, or moved it. number: the text's message."""

    def __init__(self, reason: str, number: int | None = None) -> None:
        super().__init__(reason)
        self.number = number


class Hider(Protocol):
    """How texts are handed to a template."""

    def hide(self, text: str, number: int, *, is_open: bool = False) -> str:
        """A text of message `number` that must be in the prompt. is_open: the prompt ends there."""
        ...

    def hide_raw(self, text: str) -> str:
        """A text that `tojson` writes as it stands, without quotes."""
        ...

    def hide_all(self, value: Any) -> Any:
        """A JSON value whose strings, keys too, may be in the prompt, in any order."""
        ...

    def image(self) -> str:
        """An image in a content that is a string."""
        ...


class Placeholders:
    """A word of letters and digits for each text, so that no filter of a template changes it."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._required: dict[int, int] = {}  # with the numbers of their messages
        self._known: dict[str, str] = {}

    def hide(self, text: str, number: int, *, is_open: bool = False) -> str:
        """The word; a text of nothing but white space needs none."""
        if text.strip():
            self._required[len(self._texts)] = number
        return _opened(self._around(text, "x"), is_open)

    def hide_raw(self, text: str) -> str:
        """The word for a text that `tojson` writes as it stands."""
        return self._add(text, "r")

    def hide_all(self, value: Any) -> Any:
        """The same value, a word for each of its strings: equal words for equal strings."""
        return _mapped(value, self._hide_any)

    def image(self) -> str:
        """The word for an image."""
        return f"s{NONCE}i0e"

    def split(self, rendered: str, image: str) -> list[RenderedPiece]:
        """The rendered text in pieces, with the texts back in their places.

        Raises LostTextError unless each required text is there once.
        """
        parts = _ANY.split(rendered)
        pieces = [RenderedPiece(parts[0], is_template=True)]
        found: list[int] = []
        for kind, number, following in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
            if kind == "i":
                pieces.append(RenderedPiece(image, is_template=True))
            else:
                found.append(int(number))
                pieces.append(RenderedPiece(self._text(kind, int(number)), is_template=False))
            pieces.append(RenderedPiece(following, is_template=True))
        self._check(found)
        return [piece for piece in pieces if piece.text]

    def check_traces(self, rendered: str) -> None:
        """Raises LostTextError unless each required text left one trace, however it was changed."""
        self._check([int(number) for number in _TRACE.findall(rendered)])

    def template_text(self, rendered: str, image: str) -> str:
        """The rendered text with U+0000 in the place of each text."""
        return _ANY.sub(lambda found: image if found[1] == "i" else "\0", rendered)

    def _check(self, found: Sequence[int]) -> None:
        """Raises LostTextError unless each required text is there once, in its order."""
        kept = [index for index in found if index in self._required]
        present = set(kept)
        lost = next((self._required[one] for one in self._required if one not in present), None)
        if lost is not None:
            raise LostTextError(f"it leaves out the text of messages[{lost}]", lost)
        if kept != list(self._required):
            raise LostTextError("it writes a text of the conversation twice, or moves it")

    def _hide_any(self, text: str) -> str:
        if _WORD.fullmatch(text):
            return text
        if text not in self._known:
            self._known[text] = self._around(text, "x")
        return self._known[text]

    def _around(self, text: str, kind: str) -> str:
        """The word between the text's own white space, which the template may trim."""
        core = text.strip()
        if not core:
            return text
        start = text.index(core)
        return text[:start] + self._add(core, kind) + text[start + len(core) :]

    def _add(self, text: str, kind: str) -> str:
        self._texts.append(text)
        return f"s{NONCE}{kind}{len(self._texts) - 1}e"

    def _text(self, kind: str, index: int) -> str:
        text = self._texts[index]
        return json.dumps(text, ensure_ascii=False)[1:-1] if kind == "j" else text


class RealTexts:
    """The texts as they are, but for those that `tojson` writes without quotes."""

    def __init__(self) -> None:
        self._raw: list[str] = []

    def hide(self, text: str, number: int, *, is_open: bool = False) -> str:
        """The text."""
        return _opened(text, is_open)

    def hide_raw(self, text: str) -> str:
        """A word: transformers would have an object here."""
        self._raw.append(text)
        return f"s{NONCE}r{len(self._raw) - 1}e"

    def hide_all(self, value: Any) -> Any:
        """The value."""
        return value

    def image(self) -> str:
        """The word for an image."""
        return f"s{NONCE}i0e"

    def restored(self, rendered: str, image: str) -> str:
        """The rendered text with the words' texts in their places."""
        return _ANY.sub(
            lambda found: image if found[1] == "i" else self._raw[int(found[2])], rendered
        )


class MaskedTexts(RealTexts):
    """The texts with other characters where they could become a part of a special token.

    names: of all special tokens. texts: all that is masked, to find characters that none has.
    """

    def __init__(self, names: Iterable[str], texts: Iterable[str]) -> None:
        super().__init__()
        self._names = tuple(names)
        self._whole = re.compile("|".join(map(re.escape, self._names)) or "(?!)")
        ends = sorted({name[0] for name in self._names} | {name[-1] for name in self._names})
        used = set().union(*map(set, texts))
        free = (chr(code) for code in range(_FIRST_MASK, 0x10FFFE) if chr(code) not in used)
        self._masks = dict(zip(ends, free, strict=False))
        self._ends = {ord(mask): end for end, mask in self._masks.items()}

    def hide(self, text: str, number: int, *, is_open: bool = False) -> str:
        """The text with masks."""
        return _opened(self._masked(text), is_open)

    def hide_raw(self, text: str) -> str:
        """A word whose text is masked."""
        return super().hide_raw(self._masked(text))

    def hide_all(self, value: Any) -> Any:
        """The value, its strings with masks."""
        return _mapped(value, self._masked)

    def unmasked(self, text: str) -> str:
        """The text with the real characters."""
        return text.translate(self._ends)

    def _masked(self, text: str) -> str:
        text = self._whole.sub(lambda found: self._masks[found[0][0]] + found[0][1:], text)
        return self._with_masked_start(self._with_masked_end(text))

    def _with_masked_end(self, text: str) -> str:
        """A text must not begin a name that the next text ends."""
        longest = max(
            (
                size
                for name in self._names
                for size in range(1, len(name))
                if text.endswith(name[:size])
            ),
            default=0,
        )
        if not longest:
            return text
        at = len(text) - longest
        return text[:at] + "".join(self._masks.get(char, char) for char in text[at:])

    def _with_masked_start(self, text: str) -> str:
        """A text must not end a name that the text before it began."""
        longest = max(
            (
                size
                for name in self._names
                for size in range(1, len(name))
                if text.startswith(name[-size:])
            ),
            default=0,
        )
        return "".join(self._masks.get(char, char) for char in text[:longest]) + text[longest:]


def cut_at_end(rendered: str) -> str:
    """The rendered text up to the end of its open text, as transformers cuts it.

    If the template kept the blank behind the end, it kept the text's own white space too. Raises
    LostTextError.
    """
    before, mark, behind = rendered.rpartition(_END)
    if not mark:
        raise LostTextError("it leaves out the message to continue")
    return before if behind.startswith(" ") else before.rstrip()


def strings_in(value: Any) -> Iterable[str]:
    """All strings of a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from strings_in(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings_in(item)


def _opened(text: str, is_open: bool) -> str:
    return f"{text}{_END} " if is_open else text


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The JSON value, each of its strings changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    if isinstance(value, dict):
        return {change(key): _mapped(item, change) for key, item in value.items()}
    return value
