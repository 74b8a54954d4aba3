"""What a client of Llama Stack reads: the plain answer and the events.

Owns keys and their order, and the two styles of clients: the /v1/ line expects
typed deltas and always a `tool_calls`. Knows nothing of how they are sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

import msgspec

from ...generation.answer_stream import (
    AnsweredCall,
    Completion,
    End,
    Event,
    Finish,
    PromptTold,
    TextDelta,
    ToolCallDelta,
)
from ...generation.token_text import TokenEntry

EventType = Literal["start", "progress", "complete"]
StopReason = Literal["end_of_turn", "end_of_message", "out_of_tokens"]

# How the two styles name the end of a call.
_SUCCEEDED = {False: "success", True: "succeeded"}
_FAILED = {False: "failure", True: "failed"}


class StackCallAnswer(TypedDict):
    """A call that the client is to make."""

    call_id: str
    tool_name: str
    arguments: dict[str, Any]


class StackTokenLogprobs(TypedDict):
    """The likeliest tokens of one place and the chosen one, by their texts."""

    logprobs_by_token: dict[str, float]


class StackCompletionMessage(TypedDict):
    """The answer. tool_calls: always on /v1/ paths, elsewhere where the request has tools."""

    role: Literal["assistant"]
    content: str
    stop_reason: StopReason
    tool_calls: NotRequired[list[StackCallAnswer]]


class StackCompletion(TypedDict):
    """The whole answer."""

    completion_message: StackCompletionMessage
    logprobs: list[StackTokenLogprobs] | None


class OldCallDelta(TypedDict):
    """A piece of a call, or at its end the whole one."""

    content: str | StackCallAnswer
    parse_status: Literal["started", "in_progress", "success", "failure"]


class NewDelta(TypedDict):
    """A piece of text in `text`, or of a call, or at its end the whole one, in `tool_call`."""

    type: Literal["text", "tool_call"]
    text: NotRequired[str]
    tool_call: NotRequired[str | StackCallAnswer]
    parse_status: NotRequired[Literal["started", "in_progress", "succeeded", "failed"]]


class OldStackEvent(TypedDict):
    """delta: a piece of text, or of a call. stop_reason: with the last event."""

    event_type: EventType
    delta: str | OldCallDelta
    logprobs: list[StackTokenLogprobs] | None
    stop_reason: StopReason | None


class NewStackEvent(TypedDict):
    """stop_reason: with the last event."""

    event_type: EventType
    delta: NewDelta
    logprobs: list[StackTokenLogprobs] | None
    stop_reason: StopReason | None


class OldStackChunk(TypedDict):
    """One frame of a streamed answer, for the clients before 0.1."""

    event: OldStackEvent


class NewStackChunk(TypedDict):
    """One frame of a streamed answer, for the clients from 0.1 on."""

    event: NewStackEvent


@dataclass(slots=True, frozen=True)
class StackAnswers:
    """The answers to one request.

    is_new: it came on a /v1/ path. has_tools: the request has tools, so that
    messages have tool_calls; those of the new style always have.
    """

    is_new: bool
    has_tools: bool = False

    def plain(self, completion: Completion) -> StackCompletion:
        """The whole answer, as api-reference.txt shows it.

        A call whose arguments are no JSON object, as it was cut, is text.
        """
        answer = completion.answers[0]
        calls = [_call(call) for call in answer.tool_calls]
        broken = [
            call.raw for call, told in zip(answer.tool_calls, calls, strict=True) if told is None
        ]
        message: StackCompletionMessage = {
            "role": "assistant",
            "content": answer.text + "".join(broken),
            "stop_reason": _stop_reason(answer.finish),
        }
        if self.is_new or self.has_tools:
            message["tool_calls"] = [told for told in calls if told is not None]
        return {"completion_message": message, "logprobs": _logprobs(answer.logprobs)}

    def first(self) -> list[dict[str, Any]]:
        """The event before any text: an OldStackChunk or a NewStackChunk, as all that follow."""
        return [self._event("start", self._text(""))]

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        """The events that tell of one event of the answer."""
        if isinstance(event, End | PromptTold):
            return []
        if isinstance(event, TextDelta):
            return [self._event("progress", self._text(event.text), event.logprobs)]
        if isinstance(event, ToolCallDelta):
            return self._call_events(event)
        return [self._event("complete", self._text(""), event.logprobs, _stop_reason(event))]

    def _call_events(self, event: ToolCallDelta) -> list[dict[str, Any]]:
        """started, then what the model wrote as it comes, then the call or its failure."""
        deltas = [self._part("", "started")] if event.is_first else []
        if event.raw:
            deltas.append(self._part(event.raw, "in_progress"))
        if event.whole is not None:
            call = _call(event.whole)
            status = (_FAILED if call is None else _SUCCEEDED)[self.is_new]
            deltas.append(self._part(event.whole.raw if call is None else call, status))
        logprobs = [event.logprobs, *([()] * len(deltas))]
        return [
            self._event("progress", delta, entries)
            for delta, entries in zip(deltas, logprobs, strict=False)
        ]

    def _part(self, call: str | StackCallAnswer, status: str) -> dict[str, Any]:
        if self.is_new:
            return {"type": "tool_call", "tool_call": call, "parse_status": status}
        return {"content": call, "parse_status": status}

    def _text(self, text: str) -> str | dict[str, Any]:
        return {"type": "text", "text": text} if self.is_new else text

    def _event(
        self,
        kind: str,
        delta: str | dict[str, Any],
        logprobs: Sequence[TokenEntry] = (),
        stop_reason: str | None = None,
    ) -> dict[str, Any]:
        return {
            "event": {
                "event_type": kind,
                "delta": delta,
                "logprobs": _logprobs(logprobs),
                "stop_reason": stop_reason,
            }
        }


def _call(call: AnsweredCall) -> StackCallAnswer | None:
    """The call with its arguments read; None if they are no JSON object."""
    try:
        arguments = msgspec.json.decode(call.arguments, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return None
    if not call.is_complete:
        return None
    return {"call_id": call.id, "tool_name": call.name, "arguments": arguments}


def _logprobs(entries: Sequence[TokenEntry]) -> list[StackTokenLogprobs] | None:
    """For each token the likeliest candidates and the chosen one, by their texts.

    None where the request did not ask or no token came. Of two candidates of one
    text the likelier one is told of.
    """
    if not entries:
        return None
    return [{"logprobs_by_token": _by_token(entry)} for entry in entries]


def _by_token(entry: TokenEntry) -> dict[str, float]:
    by_token: dict[str, float] = {}
    for one in (*entry.top, entry.chosen):
        by_token.setdefault(one.token.text, one.logprob)
    return by_token


def _stop_reason(finish: Finish) -> StopReason:
    if finish.reason == "length":
        return "out_of_tokens"
    return "end_of_message" if finish.is_end_of_message else "end_of_turn"


class StackModel(TypedDict):
    """One name of the served model, as Llama Stack's clients from 0.1 on read it."""

    identifier: str
    provider_resource_id: str
    provider_id: Literal["vlmserve"]
    type: Literal["model"]
    metadata: dict[str, int]
    model_type: Literal["llm"]


class StackModelList(TypedDict):
    """The served model under each of its names."""

    data: list[StackModel]


def stack_model_card(name: str, root: str, max_model_len: int) -> StackModel:
    """The card of a model's name; root is the first of its names."""
    return {
        "identifier": name,
        "provider_resource_id": root,
        "provider_id": "vlmserve",
        "type": "model",
        "metadata": {"max_model_len": max_model_len},
        "model_type": "llm",
    }
