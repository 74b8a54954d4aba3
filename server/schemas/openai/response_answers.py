"""Builds the answers of /v1/responses: the whole response, or the events of a stream.

`response_types.py` has the keys. Knows nothing of how they are sent or kept.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import msgspec

from ...errors import ApiError
from ...generation.completion import Completion
from ...generation.events import AnsweredCall, End, Event, Finish, TextDelta, ToolCallDelta, Usage
from ...generation.token_text import TokenEntry, TokenLogprob
from ..json_parts import EntryTexts
from ..streamed_answers import StreamedAnswers
from .response_types import (
    Response,
    ResponseCandidate,
    ResponseEvent,
    ResponseItem,
    ResponseLogprob,
    ResponsePart,
    ResponseUsage,
    Status,
)
from .responses import ResponsesRequest


@dataclass(slots=True)
class ResponseAnswers(StreamedAnswers):
    """The answer to one request, whole or as events.

    keep: called with the whole response where it is stored, before its client reads that it ended;
    returns whether it was stored.
    """

    is_named: ClassVar[bool] = True

    body: ResponsesRequest
    keep: Callable[[Response], Awaitable[bool]] | None = None
    id: str = field(default_factory=lambda: f"resp_{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    _is_kept: bool = True
    _sequence: int = -1
    _items: list[ResponseItem] = field(default_factory=list)
    _is_open: bool = False
    _finish: Finish | None = None

    def plain(self, completion: Completion) -> Response:
        """The whole response."""
        [answer] = completion.answers
        items: list[ResponseItem] = []
        is_cut = answer.finish.reason == "length"
        if answer.text or not answer.tool_calls:
            items.append(_message_item(answer.text, answer.logged_entries or [], is_cut))
        items += [_call_item(call) for call in answer.tool_calls]
        return self._ended(items, answer.finish, completion.usage)

    def new_log(self) -> EntryTexts:
        """For the answer's log-probabilities."""
        return EntryTexts(_logprob)

    def first(self) -> list[ResponseEvent]:
        """The events before any item."""
        response = self._response("in_progress", [])
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def chunks(self, event: Event) -> list[ResponseEvent]:
        """The events that report one event of the generation."""
        if isinstance(event, TextDelta):
            return self._text_events(event)
        if isinstance(event, ToolCallDelta):
            return self._call_events(event)
        if isinstance(event, Finish):
            self._finish = event
            self._add_logprobs(event.logprobs)
            is_empty = not self._items
            return [*(self._start_message() if is_empty else []), *self._end_item()]
        return [self._end_event(event.usage)] if isinstance(event, End) else []

    def failure(self, error: ApiError) -> Mapping[str, object]:
        """The event of a stream that failed."""
        response = self._response("failed", self._items)
        response["error"] = {"code": error.code or error.type, "message": error.message}
        return self._event("response.failed", response=response)

    async def store(self, event: Event) -> None:
        """Keep the whole response."""
        if isinstance(event, End) and self.keep is not None:
            self._is_kept = await self.keep(self._ended_stream(event.usage))

    def _ended_stream(self, usage: Usage) -> Response:
        assert self._finish is not None, "a choice has a Finish before the End"
        return self._ended(self._items, self._finish, usage)

    def _end_event(self, usage: Usage) -> ResponseEvent:
        response = self._ended_stream(usage)
        kind = "response.completed" if response["status"] == "completed" else "response.incomplete"
        return self._event(kind, response=response)

    def _text_events(self, event: TextDelta) -> list[ResponseEvent]:
        events: list[ResponseEvent] = []
        if not self._is_open or self._items[-1]["type"] != "message":
            events += self._end_item() + self._start_message()
        self._items[-1]["content"][0]["text"] += event.text
        logprobs = self._add_logprobs(event.logprobs)
        place = self._place(content_index=0)
        name = "response.output_text.delta"
        return [*events, self._event(name, **place, delta=event.text, logprobs=logprobs)]

    def _call_events(self, event: ToolCallDelta) -> list[ResponseEvent]:
        events: list[ResponseEvent] = []
        if event.is_first:
            events += self._end_item()
            events += self._start(_open_call(event))
        if event.arguments:
            self._items[-1]["arguments"] += event.arguments
            name = "response.function_call_arguments.delta"
            events.append(self._event(name, **self._place(), delta=event.arguments))
        return events

    def _start_message(self) -> list[ResponseEvent]:
        events = self._start(_message_item("", [], is_cut=False))
        item = self._items[-1]
        item["status"] = "in_progress"
        place = self._place(content_index=0)
        part = dict(item["content"][0])
        return [*events, self._event("response.content_part.added", **place, part=part)]

    def _start(self, item: ResponseItem) -> list[ResponseEvent]:
        self._items.append(item)
        self._is_open = True
        shown = dict(item) | {"status": "in_progress"}
        if item["type"] == "message":
            shown["content"] = []
        index = len(self._items) - 1
        return [self._event("response.output_item.added", output_index=index, item=shown)]

    def _end_item(self) -> list[ResponseEvent]:
        """The events that end the open item, if any."""
        if not self._is_open:
            return []
        self._is_open = False
        item = self._items[-1]
        is_cut = self._finish is not None and self._finish.reason == "length"
        item["status"] = "incomplete" if is_cut else "completed"
        done = {"output_index": len(self._items) - 1, "item": item}
        last = self._event
        if item["type"] == "function_call":
            arguments = {"name": item["name"], "arguments": item["arguments"]}
            name = "response.function_call_arguments.done"
            events = [self._event(name, **self._place(), **arguments)]
        else:
            part = item["content"][0]
            place = self._place(content_index=0)
            text = {"text": part["text"], "logprobs": part["logprobs"]}
            events = [
                self._event("response.output_text.done", **place, **text),
                self._event("response.content_part.done", **place, part=part),
            ]
        return [*events, last("response.output_item.done", **done)]

    def _place(self, **more: int) -> dict[str, Any]:
        index = len(self._items) - 1
        return {"item_id": self._items[index]["id"], "output_index": index, **more}

    def _add_logprobs(self, entries: Sequence[TokenEntry]) -> list[ResponseLogprob]:
        """The log-probabilities, which are also kept with the open text."""
        logprobs = [_logprob(entry) for entry in entries]
        if self._is_open and self._items[-1]["type"] == "message":
            self._items[-1]["content"][0]["logprobs"] += logprobs
        return logprobs

    def _event(self, kind: Any, **content: Any) -> ResponseEvent:
        self._sequence += 1
        event: ResponseEvent = {"type": kind, "sequence_number": self._sequence}
        event.update(content)  # type: ignore[typeddict-item]
        return event

    def _ended(self, items: list[ResponseItem], finish: Finish, usage: Usage) -> Response:
        is_cut = finish.reason == "length"
        response = self._response("incomplete" if is_cut else "completed", items)
        response["completed_at"] = int(time.time())
        response["incomplete_details"] = {"reason": "max_output_tokens"} if is_cut else None
        response["usage"] = _usage(usage)
        return response

    def _response(self, status: Status, items: list[ResponseItem]) -> Response:
        body = self.body
        text = {"format": {"type": "text"}} | _plain(body.text or {})
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": list(items),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": self.keep is not None and self._is_kept,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": text,
            "tool_choice": _plain(body.tool_choice or "auto"),
            "tools": [_tool(tool) for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }


def _message_item(text: str, logprobs: list[ResponseLogprob], is_cut: bool) -> ResponseItem:
    part: ResponsePart = {
        "type": "output_text",
        "text": text,
        "annotations": [],
        "logprobs": logprobs,
    }
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "status": "incomplete" if is_cut else "completed",
        "role": "assistant",
        "content": [part],
    }


def _call_item(call: AnsweredCall) -> ResponseItem:
    return {
        "id": f"fc_{uuid.uuid4().hex}",
        "type": "function_call",
        "status": "completed" if call.is_complete else "incomplete",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
    }


def _open_call(event: ToolCallDelta) -> ResponseItem:
    return _call_item(AnsweredCall(event.id, event.name, "", "", is_complete=False))


def _logprob(entry: TokenEntry) -> ResponseLogprob:
    return {
        **_candidate(entry.chosen),
        "top_logprobs": [_candidate(candidate) for candidate in entry.top],
    }


def _candidate(token: TokenLogprob) -> ResponseCandidate:
    text_bytes = token.token.text_bytes or b""
    return {"token": token.token.text, "logprob": token.logprob, "bytes": list(text_bytes)}


def _tool(tool: Any) -> dict[str, Any]:
    return {"parameters": None, "strict": None, "description": None} | _plain(tool)


def _plain(value: Any) -> Any:
    """A struct as the JSON it came from, without what was null."""
    built = msgspec.to_builtins(value)
    if not isinstance(built, dict):
        return built
    return {key: _plain(inner) for key, inner in built.items() if inner is not None}


def _usage(usage: Usage) -> ResponseUsage:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
