"""What a client of /v1/messages reads: the message, the events of a stream, errors.

Owns the keys and their order. Knows nothing of how they are sent.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NotRequired, TypedDict

import msgspec

from ...errors import ApiError, ErrorBody, error_body
from ...generation.completion import Answer, Completion
from ...generation.events import (
    AnsweredCall,
    End,
    Event,
    Finish,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from ..streamed_answers import StreamedAnswers

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]

# Anthropic's word for each status; any other status is an api_error.
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ContentBlock(TypedDict):
    """A part of the answer: text and citations of a text; id, name and input of a tool_use."""

    type: Literal["text", "tool_use"]
    text: NotRequired[str]
    citations: NotRequired[None]
    id: NotRequired[str]
    name: NotRequired[str]
    input: NotRequired[dict[str, Any]]


class MessageUsage(TypedDict):
    """Tokens. Those of the prompt that came from the cache count in cache_read_input_tokens."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessageAnswer(TypedDict):
    """The whole answer; in message_start without content and reasons."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ContentBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class EventDelta(TypedDict):
    """What is new: a piece of a block, or why the answer ended.

    type: of a piece, a text_delta with text or an input_json_delta with partial_json.
    stop_sequence: the string that matched.
    """

    type: NotRequired[Literal["text_delta", "input_json_delta"]]
    text: NotRequired[str]
    partial_json: NotRequired[str]
    stop_reason: NotRequired[StopReason]
    stop_sequence: NotRequired[str | None]


class MessageEvent(TypedDict):
    """One event of a stream. Its type determines its keys.

    message: of message_start. index: of all content_block events. content_block: of
    content_block_start. delta: of content_block_delta and message_delta. usage: of message_delta.
    """

    type: Literal[
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    message: NotRequired[MessageAnswer]
    index: NotRequired[int]
    content_block: NotRequired[ContentBlock]
    delta: NotRequired[EventDelta]
    usage: NotRequired[MessageUsage]


class TokenCount(TypedDict):
    """The tokens of a conversation, one for each image."""

    input_tokens: int


@dataclass(slots=True)
class MessageAnswers(StreamedAnswers):
    """The answer to one request, whole or as events.

    num_prompt_tokens: which a stream reports before its first token.
    """

    is_named: ClassVar[bool] = True

    model: str
    num_prompt_tokens: int
    id: str = field(default_factory=lambda: f"msg_{uuid.uuid4().hex}")
    _index: int = -1
    _open: Literal["text", "tool_use"] | None = None

    def plain(self, completion: Completion) -> MessageAnswer:
        """The whole answer."""
        [answer] = completion.answers
        message = self._message(_content(answer), _usage(completion.usage))
        reasons = _reasons(answer.finish)
        message["stop_reason"] = reasons["stop_reason"]
        message["stop_sequence"] = reasons["stop_sequence"]
        return message

    def first(self) -> list[MessageEvent]:
        """The event before any block."""
        usage = _usage(Usage(self.num_prompt_tokens, 0))
        return [{"type": "message_start", "message": self._message([], usage)}]

    def chunks(self, event: Event) -> list[MessageEvent]:
        """The events that report one event of the generation."""
        if isinstance(event, TextDelta):
            start = [] if self._open == "text" else self._start(_text(""))
            return [*start, self._delta({"type": "text_delta", "text": event.text})]
        if isinstance(event, ToolCallDelta):
            return self._call_events(event)
        if isinstance(event, Finish):
            end: MessageEvent = {
                "type": "message_delta",
                "delta": _reasons(event),
                "usage": _usage(event.usage),
            }
            return [*self._stop(), end]
        return [{"type": "message_stop"}] if isinstance(event, End) else []

    def failure(self, error: ApiError) -> Mapping[str, object]:
        """The event of a stream that failed."""
        return {"type": "error", "error": message_error_body(error)["error"]}

    def _call_events(self, event: ToolCallDelta) -> list[MessageEvent]:
        events: list[MessageEvent] = []
        if event.is_first:
            events += self._start(_call_block(event.id, event.name, {}))
        if event.arguments:
            piece: EventDelta = {"type": "input_json_delta", "partial_json": event.arguments}
            events.append(self._delta(piece))
        return events

    def _start(self, block: ContentBlock) -> list[MessageEvent]:
        """End the open block, if any, and start the next one."""
        events = self._stop()
        self._index += 1
        self._open = block["type"]
        start: MessageEvent = {
            "type": "content_block_start",
            "index": self._index,
            "content_block": block,
        }
        return [*events, start]

    def _delta(self, delta: EventDelta) -> MessageEvent:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _stop(self) -> list[MessageEvent]:
        if self._open is None:
            return []
        self._open = None
        return [{"type": "content_block_stop", "index": self._index}]

    def _message(self, content: list[ContentBlock], usage: MessageUsage) -> MessageAnswer:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }


def message_error_body(error: ApiError) -> ErrorBody:
    """The server's body of an error with Anthropic's `type`s, which its SDK reads."""
    body = error_body(error)
    body["type"] = "error"
    body["error"]["type"] = ERROR_TYPES.get(error.status, "api_error")
    return body


def _reasons(finish: Finish) -> EventDelta:
    if finish.reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if finish.reason == "tool_calls":
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if isinstance(finish.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": finish.stop_reason}
    return {"stop_reason": "end_turn", "stop_sequence": None}


def _content(answer: Answer) -> list[ContentBlock]:
    texts: list[ContentBlock] = [_text(answer.text)] if answer.text else []
    return [*texts, *map(_tool_use, answer.tool_calls)]


def _text(text: str) -> ContentBlock:
    return {"type": "text", "text": text, "citations": None}


def _tool_use(call: AnsweredCall) -> ContentBlock:
    """A call. Arguments that were cut, or are no JSON object, cannot be an input: it is empty."""
    try:
        arguments = msgspec.json.decode(call.arguments, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        arguments = {}
    return _call_block(call.id, call.name, arguments)


def _call_block(call_id: str, name: str, arguments: dict[str, Any]) -> ContentBlock:
    return {"type": "tool_use", "id": call_id, "name": name, "input": arguments}


def _usage(usage: Usage) -> MessageUsage:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
