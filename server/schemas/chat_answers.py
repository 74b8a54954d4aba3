"""What a client of /v1/chat/completions reads: the plain answer and the chunks.

Owns keys and their order. Knows nothing of how they are sent.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..answers import (
    Answer,
    AnsweredCall,
    Completion,
    End,
    Event,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from ..logprobs import PromptCandidate, PromptEntries, TokenEntry, TokenLogprob


def _new_id() -> str:
    return f"chat-{uuid.uuid4().hex}"


@dataclass(slots=True, frozen=True)
class ChatAnswers:
    """The answers to one request: all carry the same id and time.

    has_tools: the request has tools, so that its messages have tool_calls.
    """

    model: str
    include_usage: bool = False
    num_choices: int = 1
    has_tools: bool = False
    id: str = field(default_factory=_new_id)
    created: int = field(default_factory=lambda: int(time.time()))

    def plain(self, completion: Completion) -> dict[str, Any]:
        """The whole answers, as api-reference.txt shows them."""
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": [
                _choice(index, answer, self.has_tools)
                for index, answer in enumerate(completion.answers)
            ],
            "usage": _usage(completion.usage),
            "prompt_logprobs": _prompt_logprobs(completion.prompt_logprobs),
        }

    def first(self) -> list[dict[str, Any]]:
        """The chunks before any text, one a choice."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(choice, delta) for choice in range(self.num_choices)]

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        """The chunks that tell of one event."""
        if isinstance(event, TextDelta):
            return [self._chunk(event.choice, {"content": event.text}, event.logprobs)]
        if isinstance(event, ToolCallDelta):
            return self._call_chunks(event)
        if isinstance(event, End):
            return [self._usage_chunk(event.usage)] if self.include_usage else []
        return [self._chunk(event.choice, {}, event.logprobs, event.reason, event.stop_reason)]

    def _call_chunks(self, event: ToolCallDelta) -> list[dict[str, Any]]:
        """The name, then the arguments' text, as it comes."""
        chunks = []
        logprobs = event.logprobs
        if event.is_first:
            call = _call(event.id, event.name, "")
            delta = {"tool_calls": [{"index": event.index, **call}]}
            chunks.append(self._chunk(event.choice, delta, logprobs))
            logprobs = ()
        if event.arguments or logprobs:
            part = {"index": event.index, "function": {"arguments": event.arguments}}
            chunks.append(self._chunk(event.choice, {"tool_calls": [part]}, logprobs))
        return chunks

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: Sequence[TokenEntry] = (),
        finish_reason: str | None = None,
        stop_reason: str | int | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": _logprobs(logprobs),
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }
        chunk = self._frame([choice])
        if self.include_usage:
            chunk["usage"] = None
        return chunk

    def _usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return self._frame([]) | {"usage": _usage(usage)}

    def _frame(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def _choice(index: int, answer: Answer, has_tools: bool) -> dict[str, Any]:
    return {
        "index": index,
        "message": _message(answer, has_tools),
        "logprobs": _logprobs(answer.logprobs),
        "finish_reason": answer.finish.reason,
        "stop_reason": answer.finish.stop_reason,
    }


def _message(answer: Answer, has_tools: bool) -> dict[str, Any]:
    """Its content is null where there are calls and no text beside them."""
    text = answer.text if answer.text or not answer.tool_calls else None
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if has_tools:
        message["tool_calls"] = [_answered(call) for call in answer.tool_calls]
    return message


def _answered(call: AnsweredCall) -> dict[str, Any]:
    return _call(call.id, call.name, call.arguments)


def _call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _logprobs(entries: Sequence[TokenEntry]) -> dict[str, Any] | None:
    """OpenAI's ChoiceLogprobs; None where the request did not ask or no token came."""
    if not entries:
        return None
    content = [
        _candidate(entry.chosen) | {"top_logprobs": [_candidate(one) for one in entry.top]}
        for entry in entries
    ]
    return {"content": content}


def _prompt_logprobs(prompt: PromptEntries | None) -> list[dict[str, Any] | None] | None:
    """vLLM's form: for each token of the prompt its candidates by their ids."""
    if prompt is None:
        return None
    return [entry if entry is None else _by_token_id(entry) for entry in prompt]


def _by_token_id(entry: tuple[PromptCandidate, ...]) -> dict[str, Any]:
    return {
        str(one.token_id): {"logprob": one.logprob, "rank": one.rank, "decoded_token": one.text}
        for one in entry
    }


def _candidate(one: TokenLogprob) -> dict[str, Any]:
    text_bytes = one.token.text_bytes
    return {
        "token": one.token.text,
        "logprob": one.logprob,
        "bytes": None if text_bytes is None else list(text_bytes),
    }


def _usage(usage: Usage) -> dict[str, Any]:
    counts: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "completion_tokens": usage.completion_tokens,
    }
    if usage.cached_tokens:
        counts["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    return counts
