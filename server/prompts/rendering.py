"""Chooses how a conversation is rendered: by the checkpoint's template, or in Meta's format.

Owns the reasons for Meta's format, and the warning that names each once. Knows nothing of token
ids.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .chat_template import (
    ChatTemplate,
    TemplateOptions,
    TemplateRefusedError,
    TextBesideCallError,
)
from .conversation import Message, Tool, ToolFormat, with_joined_texts
from .meta_format import render_as_meta, with_tools_in_system
from .placeholders import RenderedPiece

logger = logging.getLogger(__name__)

# Why a conversation is in Meta's format. tool_format: a client asked for another form of tools.
MetaReason = Literal[
    "no_template", "system_and_images", "several_calls", "text_and_calls", "tool_format"
]
META_REASONS: tuple[MetaReason, ...] = (
    "no_template", "system_and_images", "several_calls", "text_and_calls", "tool_format",
)  # fmt: skip
_WHY: dict[MetaReason, str] = {
    "no_template": "the checkpoint has no chat template",
    "system_and_images": "the chat template refuses images beside a system message",
    "several_calls": "the chat template refuses several calls in a turn",
    "text_and_calls": "the chat template leaves out a text beside calls",
    "tool_format": "a request asked for a form of tools that chat templates do not have",
}


@dataclass(slots=True, frozen=True)
class Rendering:
    """A rendered conversation. meta_reason: why it is in Meta's format; None: by the template."""

    pieces: list[RenderedPiece]
    meta_reason: MetaReason | None = None


class Renderer:
    """Renders conversations by a checkpoint's templates.

    default: for all conversations; None: the checkpoint has none. tool_use: for those with tools,
    if it has one. on_meta: called with the reason for each prompt in Meta's format. origin: the
    file of the templates. is_guard: the templates have a guard's policy, so none is ever replaced.
    """

    def __init__(
        self,
        default: ChatTemplate | None,
        tool_use: ChatTemplate | None = None,
        on_meta: Callable[[MetaReason], None] = lambda reason: None,
        origin: str | None = None,
    ) -> None:
        self.default = default
        self.tool_use = tool_use
        self.on_meta = on_meta
        self.origin = origin
        self.is_guard = default is not None and default.is_guard
        self._warned: set[MetaReason] = set()

    @property
    def content_format(self) -> str | None:
        """How the default template gets contents; None without a template."""
        return None if self.default is None else self.default.content_format

    @property
    def is_quick(self) -> bool:
        """Whether no template needs a process of its own."""
        templates = (self.default, self.tool_use)
        return all(one.is_plain for one in templates if one is not None)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        tool_format: ToolFormat,
        options: TemplateOptions,
    ) -> Rendering:
        """The prompt in pieces. Raises TemplateRefusedError, LostChildError."""
        template = self.tool_use if tools and self.tool_use is not None else self.default
        if template is None:
            return self._by_meta("no_template", messages, tools, tool_format, options)
        if tools and tool_format != "json":
            return self._by_meta("tool_format", messages, tools, tool_format, options)
        try:
            return Rendering(template.render(messages, tools, options))
        except TemplateRefusedError as error:
            reason = _promised(error, messages, tools)
            if (
                self.is_guard
                or reason is None
                or not _is_only_reason(template, messages, tools, options)
            ):
                raise
            logger.debug("the chat template refused a conversation: %s", error)
        return self._by_meta(reason, messages, tools, tool_format, options)

    def _by_meta(
        self,
        reason: MetaReason,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        tool_format: ToolFormat,
        options: TemplateOptions,
    ) -> Rendering:
        self._count(reason)
        joined = [with_joined_texts(message) for message in messages]
        if tools and tool_format == "json" and any(message.images for message in joined):
            joined, tools = with_tools_in_system(joined, tools), ()
        pieces = render_as_meta(
            joined,
            tools,
            tool_format,
            add_generation_prompt=options.add_generation_prompt,
            continue_final_message=options.continue_final_message,
        )
        return Rendering(pieces, reason)

    def _count(self, reason: MetaReason) -> None:
        self.on_meta(reason)
        if reason not in self._warned:
            self._warned.add(reason)
            logger.warning(
                "%s: such prompts are in Meta's format of Llama 3.2 instead (logged once)",
                _WHY[reason],
            )


def _promised(
    error: TemplateRefusedError, messages: Sequence[Message], tools: Sequence[Tool]
) -> MetaReason | None:
    """What a conversation has that is served although the published template refuses it.

    Tools beside images stand in a system message. A text beside calls is one of the server's own
    answers, sent back.
    """
    if isinstance(error, TextBesideCallError):
        return "text_and_calls"
    has_images = any(message.images for message in messages)
    if has_images and (tools or any(message.role == "system" for message in messages)):
        return "system_and_images"
    if any(len(message.tool_calls) > 1 for message in messages):
        return "several_calls"
    return None


def _is_only_reason(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Tool],
    options: TemplateOptions,
) -> bool:
    """Whether the template takes the conversation without what the server promises beside it."""
    has_images = any(message.images for message in messages)
    simpler = [
        replace(message, parts=message.images, tool_calls=message.tool_calls[:1])
        if message.tool_calls
        else message
        for message in messages
        if not has_images or message.role != "system"
    ]
    if not simpler or (tools and not template.takes_tools):
        return False
    try:
        template.render(simpler, () if has_images else tools, options)
    except TemplateRefusedError:
        return False
    return True
