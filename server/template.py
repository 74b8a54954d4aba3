"""Renders a conversation as pieces: the template's own text, and the users' text.

Owns the checkpoint's chat template (run in jinja2's sandbox) and Meta's format,
which takes over where the template cannot serve. User text never passes through
the template: a sentinel stands for it, so that no text can act as a special
token. Knows nothing of token ids.
"""

from __future__ import annotations

import datetime
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .conversation import ImagePart, Message, TextPart

IMAGE = "<|image|>"
BEGIN_OF_TEXT = "<|begin_of_text|>"
Clock = Callable[[], datetime.datetime]


@dataclass(slots=True, frozen=True)
class RenderedPiece:
    """A part of a prompt; is_template says that its special tokens are special."""

    text: str
    is_template: bool


class TemplateRefusedError(Exception):
    """The chat template raised, or lost a text or an image."""


class ChatTemplate:
    """A checkpoint's chat template.

    special_tokens: names such as bos_token that the template may use. now gives
    the time for `strftime_now` and is injectable, as the published template
    writes the date. Raises ValueError if the source is no template.
    """

    def __init__(
        self, source: str, special_tokens: dict[str, str], now: Clock = datetime.datetime.now
    ) -> None:
        self._now = now
        self._special_tokens = special_tokens
        self._template = self._compile(source)

    def render(self, messages: Sequence[Message]) -> list[RenderedPiece]:
        """The prompt in pieces, up to and with the assistant's header.

        Raises TemplateRefusedError where the template cannot take the
        conversation (the published one refuses a system message with an image).
        """
        sentinels = _Sentinels()
        turns = [_as_template_turn(message, sentinels) for message in messages]
        try:
            text = self._template.render(
                messages=turns, add_generation_prompt=True, **self._special_tokens
            )
        except Exception as error:
            # A template is a program of the checkpoint's: it may fail in any way.
            raise TemplateRefusedError(f"{type(error).__name__}: {error}") from error
        pieces = sentinels.split(text)
        _check_images(pieces, sum(len(message.images) for message in messages))
        return pieces

    def _compile(self, source: str) -> Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise_template_error
        environment.globals["strftime_now"] = lambda form: self._now().strftime(form)
        try:
            return environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"the chat template does not compile: {error}") from error


def render_as_meta(messages: Sequence[Message]) -> list[RenderedPiece]:
    """The prompt in Meta's ChatFormat: no preamble, no date, every role with images."""
    pieces = [RenderedPiece(BEGIN_OF_TEXT, is_template=True)]
    for message in messages:
        pieces.append(_header(message.role))
        pieces.extend(_meta_part(part) for part in message.parts)
        pieces.append(RenderedPiece("<|eot_id|>", is_template=True))
    pieces.append(_header("assistant"))
    return pieces


def _header(role: str) -> RenderedPiece:
    return RenderedPiece(f"<|start_header_id|>{role}<|end_header_id|>\n\n", is_template=True)


def _meta_part(part: TextPart | ImagePart) -> RenderedPiece:
    if isinstance(part, ImagePart):
        return RenderedPiece(IMAGE, is_template=True)
    return RenderedPiece(part.text.strip(), is_template=False)


class _Sentinels:
    """Stands an unguessable word for each user text, and finds them again.

    Letters and digits only, so that no filter of a template changes them.
    """

    _NONCE = secrets.token_hex(16)
    _PATTERN = re.compile(f"s{_NONCE}x([0-9]+)e")

    def __init__(self) -> None:
        self._texts: list[str] = []

    def hide(self, text: str) -> str:
        """The word that stands for text; an empty text needs none."""
        text = text.strip()
        if not text:
            return ""
        self._texts.append(text)
        return f"s{self._NONCE}x{len(self._texts) - 1}e"

    def split(self, rendered: str) -> list[RenderedPiece]:
        """The rendered text in pieces, with the user's texts back in place."""
        parts = self._PATTERN.split(rendered)
        if [int(index) for index in parts[1::2]] != list(range(len(self._texts))):
            raise TemplateRefusedError("the template lost, doubled or moved a text")
        pieces = [
            RenderedPiece(part if number % 2 == 0 else self._texts[int(part)], number % 2 == 0)
            for number, part in enumerate(parts)
        ]
        return [piece for piece in pieces if piece.text]


def _as_template_turn(message: Message, sentinels: _Sentinels) -> dict[str, Any]:
    """The message as templates expect it: a string, or a list where it has images."""
    if not message.images:
        return {"role": message.role, "content": sentinels.hide(message.text)}
    return {
        "role": message.role,
        "content": [
            {"type": "image"}
            if isinstance(part, ImagePart)
            else {"type": "text", "text": sentinels.hide(part.text)}
            for part in message.parts
        ],
    }


def _check_images(pieces: Sequence[RenderedPiece], num_images: int) -> None:
    num_found = sum(piece.text.count(IMAGE) for piece in pieces if piece.is_template)
    if num_found != num_images:
        raise TemplateRefusedError(f"the template wrote {num_found} of {num_images} images")


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)
