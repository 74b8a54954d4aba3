"""What a client of /v1/completions reads: the plain answer and the chunks.

Owns the keys and their order. Knows nothing of how they are sent.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypedDict

from ...generation.completion import Answer, Completion
from ...generation.events import End, Event, Finish, PromptLogprobs, TextDelta, Usage
from ...generation.token_text import TokenEntry
from .answer_frames import (
    OpenAIAnswers,
    OpenAIChunk,
    PromptCandidates,
    TimingsAnswer,
    UsageCounts,
    prompt_candidates,
    usage_counts,
)
from .logprob_columns import ColumnTexts, TokenColumns, TokenLists

Reason = Literal["stop", "length"]


class CompletionChoice(TypedDict):
    """stop_reason: the stop string or token id that ended the text.

    token_ids: only with return_token_ids; one for each token that usage counts. prompt_token_ids:
    also with return_prompt_token_ids.
    """

    index: int
    text: str
    logprobs: TokenLists | None
    finish_reason: Reason
    stop_reason: str | int | None
    prompt_logprobs: PromptCandidates | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]


class TextCompletion(TypedDict):
    """The whole answer. timings: only with return_timings."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageCounts
    timings: NotRequired[TimingsAnswer]


class CompletionChunkChoice(TypedDict):
    """finish_reason and stop_reason come with the choice's last chunk.

    token_ids: only with return_token_ids; of the tokens since the last chunk. prompt_token_ids:
    also with return_prompt_token_ids, in the choice's first chunk.
    """

    index: int
    text: str
    logprobs: TokenLists | None
    finish_reason: Reason | None
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]


class CompletionChunk(OpenAIChunk):
    """One frame of a streamed answer.

    usage: only with stream_options.include_usage, null in all but the last chunk, whose
    choices are empty; with continuous_usage_stats every chunk has the usage so far.
    obfuscation: only with stream_options.include_obfuscation. timings: only with return_timings, in
    the last chunk.
    """

    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]


def _new_id() -> str:
    return f"cmpl-{uuid.uuid4().hex}"


@dataclass(slots=True, kw_only=True)
class CompletionAnswers(OpenAIAnswers):
    """The answers to the prompts of one request.

    num_answers: answers to each prompt. echoes: the texts of the prompts, if the answers start
    with them. num_top: how many likeliest tokens to list for each token; None: no
    log-probabilities. num_prompt_top: the same for prompt_logprobs. is_echo_only: return only the
    prompt.
    """

    num_answers: int = 1
    echoes: Sequence[str] | None = None
    num_top: int | None = None
    num_prompt_top: int | None = None
    is_echo_only: bool = False
    id: str = field(default_factory=_new_id)
    _columns: dict[int, TokenColumns] = field(default_factory=dict)
    # The choices whose stream has started.
    _started: set[int] = field(default_factory=set)

    def plain(self, completion: Completion) -> TextCompletion:
        """The whole answers, in the order of the prompts."""
        prompts = {logprobs.prompt: logprobs for logprobs in completion.prompts}
        answer: TextCompletion = {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [
                self._choice(index, answer, prompts.get(index // self.num_answers))
                for index, answer in enumerate(completion.answers)
            ],
            "usage": self._usage(completion.usage),
        }
        self.add_timings(answer, completion.timings)
        return answer

    def new_log(self) -> ColumnTexts:
        """For one answer's log-probabilities."""
        return ColumnTexts(self.num_top or 0)

    def first(self) -> list[CompletionChunk]:
        """The echoes, unless they must wait for log-probabilities."""
        if self.echoes is None or self.num_top is not None:
            return []
        return [
            self._chunk(prompt * self.num_answers + number, text)
            for prompt, text in enumerate(self.echoes)
            for number in range(self.num_answers)
        ]

    def chunks(self, event: Event) -> list[CompletionChunk]:
        """The chunks that report one event."""
        self.count(event)
        if isinstance(event, PromptLogprobs):
            return self._echoed(event)
        if isinstance(event, End):
            return [self._end_chunk(event)] if self.has_end else []
        if isinstance(event, Finish):
            return [self._last(event)]
        if isinstance(event, TextDelta) and not self.is_echo_only:
            lists = self._lists(event.choice, event.logprobs)
            return [self._chunk(event.choice, event.text, lists, token_ids=event.token_ids)]
        return []

    def _choice(
        self, index: int, answer: Answer, prompt: PromptLogprobs | None
    ) -> CompletionChoice:
        text = "" if self.echoes is None else self.echoes[index // self.num_answers]
        if not self.is_echo_only:
            text += answer.text
        candidates = None
        if self.num_prompt_top is not None:
            candidates = prompt_candidates(prompt, self.num_prompt_top)
        choice: CompletionChoice = {
            "index": index,
            "text": text,
            "logprobs": None if self.num_top is None else self._logged(answer, prompt),
            "finish_reason": self._reason(answer.finish),
            "stop_reason": None if self.is_echo_only else answer.finish.stop_reason,
            "prompt_logprobs": candidates,
        }
        if self.has_token_ids:
            choice["token_ids"] = [] if self.is_echo_only else list(answer.token_ids)
        if self.prompts is not None:
            choice["prompt_token_ids"] = self.prompts[index // self.num_answers]
        return choice

    def _logged(self, answer: Answer, prompt: PromptLogprobs | None) -> Any:
        """The lists of the prompt, if it is echoed, and of the answer."""
        columns = self.new_log()
        if self.echoes is not None and prompt is not None:
            columns.add_prompt(prompt)
        if not self.is_echo_only and isinstance(answer.logprobs, ColumnTexts):
            columns.append(answer.logprobs)
        return columns.as_json()

    def _echoed(self, prompt: PromptLogprobs) -> list[CompletionChunk]:
        """The prompt, if it is echoed with its log-probabilities."""
        if self.echoes is None or self.num_top is None:
            return []
        chunks = []
        for number in range(self.num_answers):
            index = prompt.prompt * self.num_answers + number
            columns = self._columns_of(index)
            columns.add_prompt(prompt)
            chunks.append(self._chunk(index, self.echoes[prompt.prompt], columns.take()))
        return chunks

    def _last(self, event: Finish) -> CompletionChunk:
        if self.is_echo_only:
            return self._chunk(event.choice, "", None, "length")
        lists = self._lists(event.choice, event.logprobs)
        reason = self._reason(event)
        return self._chunk(
            event.choice, "", lists, reason, event.stop_reason, token_ids=event.token_ids
        )

    def _reason(self, finish: Finish) -> Reason:
        return "length" if self.is_echo_only or finish.reason == "length" else "stop"

    def _lists(self, index: int, entries: Sequence[TokenEntry]) -> TokenLists | None:
        if not entries:
            return None
        columns = self._columns_of(index)
        columns.add(entries)
        return columns.take()

    def _columns_of(self, index: int) -> TokenColumns:
        return self._columns.setdefault(index, TokenColumns(self.num_top or 0))

    def _chunk(
        self,
        index: int,
        text: str,
        logprobs: TokenLists | None = None,
        finish_reason: Reason | None = None,
        stop_reason: str | int | None = None,
        *,
        token_ids: Sequence[int] = (),
    ) -> CompletionChunk:
        choice: CompletionChunkChoice = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }
        if self.has_token_ids:
            choice["token_ids"] = list(token_ids)
        if self.prompts is not None and index not in self._started:
            self._started.add(index)
            choice["prompt_token_ids"] = self.prompts[index // self.num_answers]
        chunk = self._frame([choice])
        self.complete(chunk, text)
        return chunk

    def _usage(self, usage: Usage) -> UsageCounts:
        if self.is_echo_only:
            usage = Usage(usage.prompt_tokens, 0, usage.cached_tokens)
        return usage_counts(usage)

    def _end_chunk(self, end: End) -> CompletionChunk:
        chunk = self._frame([])
        if self.include_usage:
            chunk["usage"] = self._usage(end.usage)
        self.add_timings(chunk, end.timings)
        return chunk

    def _frame(self, choices: list[CompletionChunkChoice]) -> CompletionChunk:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
