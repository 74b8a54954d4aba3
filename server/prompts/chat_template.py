"""Renders a conversation by a checkpoint's chat template.

Owns what a template is given, and that no text of a client can act as a special token. A plain
template (`templates/plain.py`) gets placeholders for texts and runs in the worker, once. Any other
runs in a child, where it also gets the real texts, because it may look into them. Knows nothing of
token ids.
"""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, Literal

from jinja2 import Template, TemplateError

from .conversation import ImagePart, Message, TextPart, Tool, ToolCall, with_joined_texts
from .placeholders import (
    NONCE,
    Hider,
    LostTextError,
    MaskedTexts,
    Placeholders,
    RealTexts,
    RenderedPiece,
    cut_at_end,
    strings_in,
)
from .templates.child import Question, Rendered
from .templates.content_format import ContentFormat, ContentFormats, content_formats
from .templates.environment import Clock, make_environment, reason_of, render
from .templates.plain import is_plain
from .templates.processes import TemplateError as BoundError
from .templates.processes import TemplateProcesses

IMAGE = "<|image|>"
# What a rendering may have; texts in a child's rendering are real, and in a body of 64 MiB at most.
MAX_CHARS = 1 << 27
FormatOption = Literal["auto", "string", "openai"]
# What the server itself gives to templates: no request can set it.
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt",
                      "continue_final_message", "chat_template", "tokenize"})  # fmt: skip
# Llama Guard's policy stands between such marks, whatever its version.
_GUARD_MARK = re.compile(r"UNSAFE CONTENT CATEGORIES")


class TemplateRefusedError(Exception):
    """The chat template raised, or lost a text or an image. The message has its words."""


class TextBesideCallError(TemplateRefusedError):
    """The chat template left out the text of a message that has calls of tools."""


@dataclass(slots=True, frozen=True)
class TemplateOptions:
    """How a conversation is to be rendered.

    add_generation_prompt: the header of the answer stands at the end. continue_final_message: the
    prompt ends within the last message. variables: the client's, for the template.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: dict[str, Any] = field(default_factory=dict)


AS_USUAL = TemplateOptions()


@functools.lru_cache(4)
def _read(source: str) -> tuple[ContentFormats, CodeType | None]:
    """How a template reads contents, and its code if it is plain. Raises ValueError."""
    environment = make_environment(nonce=NONCE)
    try:
        tree = environment.parse(source)
        formats = content_formats(tree)
        return formats, environment.compile(tree) if is_plain(tree) else None
    except (TemplateError, RecursionError) as error:
        raise ValueError(f"the chat template does not compile: {reason_of(error)}") from error


class ChatTemplate:
    """A checkpoint's chat template.

    special_tokens: names such as bos_token that the template may use. now gives
    the time for `strftime_now` and is injectable, as the published template
    writes the date. marks: the names of the tokenizer's special tokens. content_format: how
    contents are handed over; auto reads it from the template. processes: where a template that is
    not plain is rendered. Raises ValueError if the source is no template.
    """

    def __init__(
        self,
        source: str,
        special_tokens: dict[str, str],
        now: Clock = datetime.datetime.now,
        *,
        marks: Iterable[str] = (IMAGE,),
        content_format: FormatOption = "auto",
        processes: TemplateProcesses | None = None,
    ) -> None:
        self._source = source
        self._now = now
        self._special_tokens = special_tokens
        self._marks = tuple(marks)
        self._any_mark = any_of(self._marks)
        self.takes_tools = "tools" in source
        self.is_guard = _GUARD_MARK.search(source) is not None
        self._option = content_format
        self.formats, code = _read(source)
        self.is_plain = code is not None
        environment = make_environment(now, NONCE)
        self._template = (
            Template.from_code(environment, code, environment.make_globals(None)) if code else None
        )
        self._processes = processes or TemplateProcesses()

    @property
    def content_format(self) -> str:
        """How the contents of users are handed over: string, openai (as lists), or both."""
        return self._option if self._option != "auto" else self.formats.of_role("user")

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        options: TemplateOptions = AS_USUAL,
    ) -> list[RenderedPiece]:
        """The prompt in pieces.

        Raises TemplateRefusedError where the template cannot take the conversation, and
        LostChildError if its process ended through no fault of the template.
        """
        self._check_tools(messages, tools, options)
        forms = self._forms(messages, bool(tools))
        try:
            pieces = self._rendered(_Input(messages, tools, options, forms))
        except TemplateRefusedError:
            # It may read lists of some roles only.
            others = self._other_forms(messages, forms)
            if others == forms:
                raise
            pieces = self._rendered(_Input(messages, tools, options, others))
        _check_images(pieces, sum(len(message.images) for message in messages))
        return pieces

    def _forms(self, messages: Sequence[Message], has_tools: bool) -> list[bool]:
        """For each message whether its content is handed over as a list."""
        if self._option != "auto":
            return [self._option == "openai"] * len(messages)
        return [
            _is_list(message, self.formats.of_role(message.role), has_tools) for message in messages
        ]

    def _other_forms(self, messages: Sequence[Message], forms: list[bool]) -> list[bool]:
        """The same forms, but strings for the contents of systems and tools."""
        if self._option != "auto":
            return forms
        return [
            is_list and message.role in ("user", "assistant")
            for message, is_list in zip(messages, forms, strict=True)
        ]

    def _rendered(self, given: _Input) -> list[RenderedPiece]:
        try:
            return self._pieces(given)
        except LostTextError as error:
            raise _refusal(error, given.messages) from error

    def _pieces(self, given: _Input) -> list[RenderedPiece]:
        """Raises TemplateRefusedError, LostTextError or LostChildError."""
        hidden = Placeholders()
        variables = [self._variables(given, hidden)]
        if self._template is not None:
            text = _text_of(Rendered(self._run(variables[0])), given.options)
            return hidden.split(text, IMAGE)
        real = RealTexts()
        variables.append(self._variables(given, real))
        masked = MaskedTexts(self._marks, list(given.strings()))
        variables.append(self._variables(given, masked))
        try:
            by_words, truth, by_masks = self._processes.render(
                Question(self._source, self._now().isoformat(), NONCE, variables, MAX_CHARS)
            )
        except BoundError as error:
            raise TemplateRefusedError(str(error)) from error
        return self._compared(
            _Renderings(hidden, by_words, real, truth, masked, by_masks), given.options
        )

    def _run(self, variables: dict[str, Any]) -> str:
        assert self._template is not None
        try:
            return render(self._template, variables, MAX_CHARS)
        except Exception as error:
            # A template is a program of the checkpoint's: it may fail in any way.
            raise TemplateRefusedError(reason_of(error)) from error

    def _compared(self, found: _Renderings, options: TemplateOptions) -> list[RenderedPiece]:
        """The pieces of what the template makes of the real texts.

        By their words, if those make the same text; else by masks. Raises LostTextError, or
        TemplateRefusedError if a special token in it may be of a client's text.
        """
        text = found.real.restored(_text_of(found.truth, options), IMAGE)
        by_words = _text_of(found.by_words, options)
        try:
            pieces = found.hidden.split(by_words, IMAGE)
            if "".join(piece.text for piece in pieces) == text:
                return pieces
        except LostTextError:
            pass
        found.hidden.check_traces(by_words)
        masked = found.masked.restored(_text_of(found.by_masks, options), IMAGE)
        marks = self._any_mark.findall(found.hidden.template_text(by_words, IMAGE))
        if found.masked.unmasked(masked) != text or self._any_mark.findall(masked) != marks:
            raise TemplateRefusedError("it changes a text that spells a special token")
        return _unmasked_pieces(masked, self._any_mark, found.masked.unmasked)

    def _variables(self, given: _Input, hider: Hider) -> dict[str, Any]:
        """What transformers gives a template too, its texts as the hider hands them over."""
        last = len(given.messages) - 1 if given.options.continue_final_message else -1
        return {
            "messages": [
                _as_template_turn(message, hider, number, is_list=is_list, is_open=number == last)
                for number, (message, is_list) in enumerate(
                    zip(given.messages, given.forms, strict=True)
                )
            ],
            "tools": [hider.hide_all(tool.definition) for tool in given.tools] or None,
            "documents": None,
            "add_generation_prompt": given.options.add_generation_prompt,
            **self._special_tokens,
            **hider.hide_all(given.options.variables),
        }

    def _check_tools(
        self, messages: Sequence[Message], tools: Sequence[Tool], options: TemplateOptions
    ) -> None:
        """Refuse what a template would lose or put into another's mouth, without a word."""
        if tools and not self.takes_tools:
            raise TemplateRefusedError("it takes no tools")
        if any(message.tool_calls for message in messages) and "tool_calls" not in self._source:
            raise TemplateRefusedError("it takes no calls of tools")
        is_in_user = options.variables.get("tools_in_user_message") is not False
        if tools and is_in_user and self.formats.head is not None:
            first = next((message for message in messages if message.role != "system"), None)
            if first is None or first.role != "user":
                raise TemplateRefusedError("tools stand in the first user message: there is none")


@dataclass(slots=True, frozen=True)
class _Input:
    """What is rendered. forms: for each message whether its content is a list."""

    messages: Sequence[Message]
    tools: Sequence[Tool]
    options: TemplateOptions
    forms: Sequence[bool]

    def strings(self) -> Iterable[str]:
        """Every string that a client gave."""
        for message in self.messages:
            yield from (part.text for part in message.parts if isinstance(part, TextPart))
            for call in message.tool_calls:
                yield call.name
                yield from strings_in(call.arguments)
        for tool in self.tools:
            yield from strings_in(tool.definition)
        yield from strings_in(self.options.variables)


@dataclass(slots=True, frozen=True)
class _Renderings:
    """One conversation rendered in three ways."""

    hidden: Placeholders
    by_words: Rendered
    real: RealTexts
    truth: Rendered
    masked: MaskedTexts
    by_masks: Rendered


def any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Finds the names, the longest where one begins another; never matches without names."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _is_list(message: Message, form: ContentFormat, has_tools: bool) -> bool:
    """Whether a content is a list: several parts are, where the template takes both forms."""
    if form == "both":
        # With tools, published templates read the first user's text as a string.
        is_talk = message.role in ("user", "assistant")
        return bool(message.images) or (is_talk and len(message.parts) > 1 and not has_tools)
    return form == "openai"


def _text_of(rendered: Rendered, options: TemplateOptions) -> str:
    """The text up to where the prompt ends. Raises TemplateRefusedError, LostTextError."""
    if rendered.text is None:
        raise TemplateRefusedError(rendered.error or "it gives no reason")
    if not options.continue_final_message:
        return rendered.text
    return cut_at_end(rendered.text)


def _refusal(error: LostTextError, messages: Sequence[Message]) -> TemplateRefusedError:
    """The refusal with what was lost. Many templates drop a text beside a call."""
    if error.number is None or not messages[error.number].tool_calls:
        return TemplateRefusedError(str(error))
    return TextBesideCallError(
        f"{error}, which has calls of tools: send the text in a message before it"
    )


def _unmasked_pieces(
    masked: str, any_mark: re.Pattern[str], unmask: Callable[[str], str]
) -> list[RenderedPiece]:
    """The text cut at its special tokens, which are the template's."""
    pieces: list[RenderedPiece] = []
    begin = 0
    for found in any_mark.finditer(masked):
        pieces.append(RenderedPiece(unmask(masked[begin : found.start()]), is_template=False))
        pieces.append(RenderedPiece(found[0], is_template=True))
        begin = found.end()
    pieces.append(RenderedPiece(unmask(masked[begin:]), is_template=False))
    return [piece for piece in pieces if piece.text]


def _as_template_turn(
    message: Message, hider: Hider, number: int, *, is_list: bool, is_open: bool
) -> dict[str, Any]:
    """The message as templates expect it. is_open: the prompt ends behind its last text."""
    parts = message.parts
    if is_open and not any(isinstance(part, TextPart) for part in parts):
        parts = (*parts, TextPart(""))
    content: Any
    if is_list:
        content = [
            {"type": "image"}
            if isinstance(part, ImagePart)
            else {
                "type": "text",
                "text": hider.hide(part.text, number, is_open=is_open and part is parts[-1]),
            }
            for part in parts
        ]
    else:
        runs = with_joined_texts(Message(message.role, parts)).parts
        content = "".join(
            hider.image()
            if isinstance(part, ImagePart)
            else hider.hide(part.text, number, is_open=is_open and part is runs[-1])
            for part in runs
        )
    return {"role": message.role, "content": content} | _as_template_calls(message, hider)


def _as_template_calls(message: Message, hider: Hider) -> dict[str, Any]:
    # Templates ask whether the key is there at all.
    if not message.tool_calls:
        return {}
    functions = [
        {"name": hider.hide_all(call.name), "arguments": _as_template_arguments(call, hider)}
        for call in message.tool_calls
    ]
    return {"tool_calls": [{"type": "function", "function": one} for one in functions]}


def _as_template_arguments(call: ToolCall, hider: Hider) -> Any:
    if isinstance(call.arguments, str):
        return hider.hide_raw(call.arguments)
    return hider.hide_all(call.arguments)


def _check_images(pieces: Sequence[RenderedPiece], num_images: int) -> None:
    num_found = sum(piece.text.count(IMAGE) for piece in pieces if piece.is_template)
    if num_found != num_images:
        raise TemplateRefusedError(f"it writes {num_found} of {num_images} images")
