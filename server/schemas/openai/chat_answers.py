"""What a client of /v1/chat/completions reads: the plain answer and the chunks.

Owns the keys and their order. Knows nothing of how they are sent.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NotRequired, TypedDict

from ...generation.completion import Answer, Completion
from ...generation.events import (
    AnsweredCall,
    ChoiceEvent,
    End,
    Event,
    FinishReason,
    PromptLogprobs,
    TextDelta,
    ToolCallDelta,
)
from ...generation.token_text import TokenEntry, TokenLogprob
from ..json_parts import EntryTexts
from .answer_frames import (
    OpenAIAnswers,
    OpenAIChunk,
    PromptCandidates,
    TimingsAnswer,
    UsageCounts,
    prompt_candidates,
    usage_counts,
)


class CandidateToken(TypedDict):
    """A candidate token. bytes: null for a special token."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenToken(CandidateToken):
    """A token of the answer and the likeliest candidates at its position."""

    top_logprobs: list[CandidateToken]


class ChoiceLogprobs(TypedDict):
    """One entry for each token that usage counts."""

    content: list[ChosenToken]


class CallOfFunction(TypedDict):
    """arguments: JSON as text, exactly as the model wrote it."""

    name: str
    arguments: str


class ChatCall(TypedDict):
    """A call for the client to make."""

    id: str
    type: Literal["function"]
    function: CallOfFunction


class ChatMessage(TypedDict):
    """The answer. tool_calls: only if the request has tools."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: NotRequired[list[ChatCall]]


class ChatChoice(TypedDict):
    """stop_reason: the stop string or token id that ended the answer.

    token_ids: only with return_token_ids, one for each token that usage counts.
    """

    index: int
    message: ChatMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]


class ChatCompletion(TypedDict):
    """The whole answer. prompt_token_ids: only with return_token_ids or return_prompt_token_ids.

    timings: only with return_timings.
    """

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageCounts
    prompt_logprobs: PromptCandidates | None
    prompt_token_ids: NotRequired[list[int]]
    timings: NotRequired[TimingsAnswer]


class PartOfFunction(TypedDict):
    """name: only in the first piece of a call."""

    name: NotRequired[str]
    arguments: str


class PartOfCall(TypedDict):
    """A piece of a call. The first piece has id, type and the function's name."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: PartOfFunction


class ChatDelta(TypedDict):
    """The new part: first the role, then pieces of text or calls, empty in the last chunk."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    tool_calls: NotRequired[list[PartOfCall]]


class ChatChunkChoice(TypedDict):
    """finish_reason and stop_reason come with the choice's last chunk.

    token_ids: only with return_token_ids, of the tokens since the last chunk. prompt_token_ids:
    only with return_prompt_token_ids, in the choice's first chunk.
    """

    index: int
    delta: ChatDelta
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]


class ChatCompletionChunk(OpenAIChunk):
    """One frame of a streamed answer.

    usage: only with stream_options.include_usage, null in all but the last chunk, whose
    choices are empty; with continuous_usage_stats every chunk has the usage so far.
    obfuscation: only with stream_options.include_obfuscation. prompt_token_ids: only with
    return_token_ids or return_prompt_token_ids, in the first chunk. timings: only with
    return_timings, in the last chunk.
    """

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    prompt_token_ids: NotRequired[list[int]]


def _new_id() -> str:
    return f"chat-{uuid.uuid4().hex}"


@dataclass(slots=True, kw_only=True)
class ChatAnswers(OpenAIAnswers):
    """The answers to one conversation.

    has_tools: the request has tools, so its messages have tool_calls. is_call: the answer must be
    calls, so no stream of it opens with an empty text.
    """

    num_choices: int = 1
    has_tools: bool = False
    is_call: bool = False
    id: str = field(default_factory=_new_id)

    def plain(self, completion: Completion) -> ChatCompletion:
        """The whole answers, in the form of api-reference.txt."""
        prompt = completion.prompts[0] if completion.prompts else None
        answer: ChatCompletion = {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": [self._choice(index, one) for index, one in enumerate(completion.answers)],
            "usage": usage_counts(completion.usage),
            "prompt_logprobs": prompt_candidates(prompt),
        }
        if self.prompts is not None:
            answer["prompt_token_ids"] = self.prompts[0]
        self.add_timings(answer, completion.timings)
        return answer

    def new_log(self) -> EntryTexts:
        """For one answer's log-probabilities."""
        return EntryTexts(_chosen)

    def first(self) -> list[ChatCompletionChunk]:
        """The chunks before any text, one a choice."""
        delta: ChatDelta = {"role": "assistant", "content": None if self.is_call else ""}
        chunks = [self._chunk(choice, delta) for choice in range(self.num_choices)]
        if self.prompts is not None:
            chunks[0]["prompt_token_ids"] = self.prompts[0]
            for chunk in chunks if self.has_prompt_ids else ():
                chunk["choices"][0]["prompt_token_ids"] = self.prompts[0]
        return chunks

    def chunks(self, event: Event) -> list[ChatCompletionChunk]:
        """The chunks that report one event."""
        self.count(event)
        if isinstance(event, TextDelta):
            return [self._chunk(event.choice, {"content": event.text}, event)]
        if isinstance(event, ToolCallDelta):
            return self._call_chunks(event)
        if isinstance(event, PromptLogprobs):
            # Streams cannot request them.
            return []
        if isinstance(event, End):
            return [self._end_chunk(event)] if self.has_end else []
        return [self._chunk(event.choice, {}, event, event.reason, event.stop_reason)]

    def _call_chunks(self, event: ToolCallDelta) -> list[ChatCompletionChunk]:
        """First the name, then the text of the arguments as it comes."""
        chunks = []
        tokens: ToolCallDelta | None = event
        if event.is_first:
            first: PartOfCall = {
                "index": event.index,
                "id": event.id,
                "type": "function",
                "function": {"name": event.name, "arguments": ""},
            }
            chunks.append(self._chunk(event.choice, {"tool_calls": [first]}, event))
            tokens = None
        if event.arguments or (tokens and (tokens.logprobs or tokens.token_ids)):
            part: PartOfCall = {"index": event.index, "function": {"arguments": event.arguments}}
            chunks.append(self._chunk(event.choice, {"tool_calls": [part]}, tokens))
        return chunks

    def _chunk(
        self,
        index: int,
        delta: ChatDelta,
        tokens: ChoiceEvent | None = None,
        finish_reason: FinishReason | None = None,
        stop_reason: str | int | None = None,
    ) -> ChatCompletionChunk:
        """tokens: the event whose tokens the chunk reports."""
        choice: ChatChunkChoice = {
            "index": index,
            "delta": delta,
            "logprobs": _logprobs(tokens.logprobs if tokens else ()),
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }
        if self.has_token_ids:
            choice["token_ids"] = list(tokens.token_ids) if tokens else []
        chunk = self._frame([choice])
        self.complete(chunk, delta.get("content") or "")
        return chunk

    def _choice(self, index: int, answer: Answer) -> ChatChoice:
        logged = answer.logged_entries
        choice: ChatChoice = {
            "index": index,
            "message": _message(answer, self.has_tools),
            "logprobs": None if logged is None else {"content": logged},
            "finish_reason": answer.finish.reason,
            "stop_reason": answer.finish.stop_reason,
        }
        if self.has_token_ids:
            choice["token_ids"] = list(answer.token_ids)
        if self.has_prompt_ids and self.prompts is not None:
            choice["prompt_token_ids"] = self.prompts[0]
        return choice

    def _end_chunk(self, end: End) -> ChatCompletionChunk:
        chunk = self._frame([])
        if self.include_usage:
            chunk["usage"] = usage_counts(end.usage)
        self.add_timings(chunk, end.timings)
        return chunk

    def _frame(self, choices: list[ChatChunkChoice]) -> ChatCompletionChunk:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def _message(answer: Answer, has_tools: bool) -> ChatMessage:
    """The message; its content is null if there are calls and no text."""
    text = answer.text if answer.text or not answer.tool_calls else None
    message: ChatMessage = {"role": "assistant", "content": text}
    if has_tools:
        message["tool_calls"] = [_answered(call) for call in answer.tool_calls]
    return message


def _answered(call: AnsweredCall) -> ChatCall:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _logprobs(entries: Sequence[TokenEntry]) -> ChoiceLogprobs | None:
    """OpenAI's ChoiceLogprobs; None if not requested or if there is no token."""
    if not entries:
        return None
    return {"content": [_chosen(entry) for entry in entries]}


def _chosen(entry: TokenEntry) -> ChosenToken:
    return {
        **_candidate(entry.chosen),
        # not by `_candidate`: a whole answer may have a million of these
        "top_logprobs": [
            {"token": text.text, "logprob": logprob, "bytes": text.byte_values}
            for text, logprob in entry.top
        ],
    }


def _candidate(token: TokenLogprob) -> CandidateToken:
    text, logprob = token
    return {"token": text.text, "logprob": logprob, "bytes": text.byte_values}
