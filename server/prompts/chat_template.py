"""Renders a conversation by the checkpoint's chat template, run in jinja2's sandbox.

User text never passes through the template: a placeholder replaces it, so no text, tool or
call can act as a special token. Knows nothing of token ids.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .conversation import ImagePart, Message, Tool, ToolCall
from .placeholders import LostTextError, RenderedPiece, Sentinels

IMAGE = "<|image|>"
BEGIN_OF_TEXT = "<|begin_of_text|>"
Clock = Callable[[], datetime.datetime]


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
        self._takes_tools = "tools" in source and "tool_calls" in source
        self._template = self._compile(source)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        *,
        add_generation_prompt: bool = True,
    ) -> list[RenderedPiece]:
        """The prompt in pieces; with add_generation_prompt, it ends with the assistant's header.

        Raises TemplateRefusedError if the template cannot render the conversation (the published
        one rejects a system message with an image, and several calls in one turn).
        """
        self._check_tools(messages, tools)
        sentinels = Sentinels()
        turns = [_as_template_turn(message, sentinels) for message in messages]
        offered = {"tools": [sentinels.hide_all(tool.definition) for tool in tools]}
        try:
            text = self._template.render(
                messages=turns,
                add_generation_prompt=add_generation_prompt,
                **(offered if tools else {}),
                **self._special_tokens,
            )
            pieces = sentinels.split(text)
        except LostTextError as error:
            raise TemplateRefusedError(str(error)) from error
        except Exception as error:
            # A template is a program from the checkpoint: it may fail in any way.
            raise TemplateRefusedError(f"{type(error).__name__}: {error}") from error
        _check_images(pieces, sum(len(message.images) for message in messages))
        return pieces

    def _check_tools(self, messages: Sequence[Message], tools: Sequence[Tool]) -> None:
        """Reject what a template would silently drop, or put into the wrong turn."""
        uses_tools = any(message.tool_calls or message.role == "tool" for message in messages)
        if (tools or uses_tools) and not self._takes_tools:
            raise TemplateRefusedError("the template does not support tools")
        first = next((message for message in messages if message.role != "system"), None)
        if tools and (first is None or first.role != "user"):
            raise TemplateRefusedError("tools go into the first user message: there is none")

    def _compile(self, source: str) -> Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = Sentinels.tojson
        environment.globals["raise_exception"] = _raise_template_error
        environment.globals["strftime_now"] = lambda form: self._now().strftime(form)
        try:
            return environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"the chat template does not compile: {error}") from error


def _as_template_turn(message: Message, sentinels: Sentinels) -> dict[str, Any]:
    """The message as templates expect it: a string, or a list if it has images."""
    if message.role == "tool":
        return {"role": "tool", "content": sentinels.hide(message.text)}
    if not message.images:
        turn = {"role": message.role, "content": sentinels.hide(message.text.strip())}
        return turn | _as_template_calls(message, sentinels)
    return {
        "role": message.role,
        "content": [
            {"type": "image"}
            if isinstance(part, ImagePart)
            else {"type": "text", "text": sentinels.hide(part.text.strip())}
            for part in message.parts
        ],
    }


def _as_template_calls(message: Message, sentinels: Sentinels) -> dict[str, Any]:
    # Templates check whether the key exists.
    if not message.tool_calls:
        return {}
    functions = [
        {
            "name": sentinels.hide_all(call.name),
            "arguments": _as_template_arguments(call, sentinels),
        }
        for call in message.tool_calls
    ]
    return {"tool_calls": [{"type": "function", "function": one} for one in functions]}


def _as_template_arguments(call: ToolCall, sentinels: Sentinels) -> Any:
    if isinstance(call.arguments, str):
        return sentinels.hide_raw(call.arguments)
    return sentinels.hide_all(call.arguments)


def _check_images(pieces: Sequence[RenderedPiece], num_images: int) -> None:
    num_found = sum(piece.text.count(IMAGE) for piece in pieces if piece.is_template)
    if num_found != num_images:
        raise TemplateRefusedError(f"the template wrote {num_found} of {num_images} images")


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)
