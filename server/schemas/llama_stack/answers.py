"""What a client of Llama Stack reads: the plain answer and the events.

Owns the keys and their order, and the two styles of clients: clients of /v1/ paths expect
typed deltas and always `tool_calls`. Knows nothing of how they are sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

import msgspec

from ...generation.completion import Completion
from ...generation.events import (
    AnsweredCall,
    End,
    Event,
    Finish,
    PromptLogprobs,
    TextDelta,
    ToolCallDelta,
)
from ...generation.token_text import TokenEntry
from ..json_parts import EntryTexts
from ..streamed_answers import StreamedAnswers

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
    """The likeliest tokens at one position and the chosen one, by their texts."""

    logprobs_by_token: dict[str, float]


class StackCompletionMessage(TypedDict):
    """The answer. tool_calls: always on /v1/ paths; on others, only if the request has tools."""

    role: Literal["assistant"]
    content: str
    stop_reason: StopReason
    tool_calls: NotRequired[list[StackCallAnswer]]


class StackCompletion(TypedDict):
    """The whole answer."""

    completion_message: StackCompletionMessage
    logprobs: list[StackTokenLogprobs] | None


class OldCallDelta(TypedDict):
    """A piece of a call, or the whole call at its end."""

    content: str | StackCallAnswer
    parse_status: Literal["started", "in_progress", "success", "failure"]


class NewDelta(TypedDict):
    """text: a piece of text. tool_call: a piece of a call, or the whole call at its end."""

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
class StackAnswers(StreamedAnswers):
    """The answers to one request.

    is_new: the request came on a /v1/ path. has_tools: the request has tools, so messages have
    tool_calls; messages of the new style always have them.
    """

    is_new: bool
    has_tools: bool = False

    def plain(self, completion: Completion) -> StackCompletion:
        """The whole answer, in the form of api-reference.txt.

        A call whose arguments are not a JSON object (it was cut) becomes text.
        """
        answer = completion.answers[0]
        calls = [_call(call) for call in answer.tool_calls]
        broken = [
            call.raw
            for call, parsed in zip(answer.tool_calls, calls, strict=True)
            if parsed is None
        ]
        message: StackCompletionMessage = {
            "role": "assistant",
            "content": answer.text + "".join(broken),
            "stop_reason": _stop_reason(answer.finish),
        }
        if self.is_new or self.has_tools:
            message["tool_calls"] = [call for call in calls if call is not None]
        return {"completion_message": message, "logprobs": answer.logged_entries}

    def new_log(self) -> EntryTexts:
        """For the answer's log-probabilities."""
        return EntryTexts(_token_logprobs)

    def first(self) -> list[dict[str, Any]]:
        """The frame before any text: an OldStackChunk or a NewStackChunk, like all that follow."""
        return [self._event("start", self._text(""))]

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        """The frames that report one event of the answer."""
        if isinstance(event, End | PromptLogprobs):
            return []
        if isinstance(event, TextDelta):
            return [self._event("progress", self._text(event.text), event.logprobs)]
        if isinstance(event, ToolCallDelta):
            return self._call_events(event)
        return [self._event("complete", self._text(""), event.logprobs, _stop_reason(event))]

    def _call_events(self, event: ToolCallDelta) -> list[dict[str, Any]]:
        """First "started", then the model's text as it comes, then the call or its failure."""
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
    """The call with its arguments decoded; None if they are not a JSON object."""
    try:
        arguments = msgspec.json.decode(call.arguments, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return None
    if not call.is_complete:
        return None
    return {"call_id": call.id, "tool_name": call.name, "arguments": arguments}


def _logprobs(entries: Sequence[TokenEntry]) -> list[StackTokenLogprobs] | None:
    """For each token, the likeliest candidates and the chosen token by their texts.

    None if not requested or if there is no token. If two candidates have the same text, the
    likelier one is kept.
    """
    if not entries:
        return None
    return [_token_logprobs(entry) for entry in entries]


def _token_logprobs(entry: TokenEntry) -> StackTokenLogprobs:
    by_token: dict[str, float] = {}
    for candidate in (*entry.top, entry.chosen):
        by_token.setdefault(candidate.token.text, candidate.logprob)
    return {"logprobs_by_token": by_token}


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


class OldStackModel(StackModel):
    """The same for the clients before 0.1; llama_model is the older name of the model's root."""

    llama_model: str


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


def old_stack_model_card(name: str, root: str, max_model_len: int) -> OldStackModel:
    """The same card for the clients before 0.1."""
    return {**stack_model_card(name, root, max_model_len), "llama_model": root}
