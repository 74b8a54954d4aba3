"""The events of an answer, which every API reports in its own form.

For each request: PromptLogprobs for each prompt (if requested), then TextDelta and ToolCallDelta
and one Finish for each choice, then one End. Knows nothing of prompts, images or HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..telemetry.request_record import Timings
from .token_text import PromptEntries, TokenEntry, TokenText


@dataclass(slots=True, frozen=True)
class Usage:
    """Tokens of a request, or of one choice; the stopping token counts.

    cached_tokens: tokens of the prompt read from the cache.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(slots=True, frozen=True)
class TextDelta:
    """A piece of one choice's answer, never empty.

    logprobs: of the tokens since the last piece, if requested. A token whose text is still
    buffered (half a character, or the start of a stop string) comes with the next piece.
    token_ids: of the same tokens, if requested. num_tokens: of the choice so far, including
    buffered ones.
    """

    text: str
    logprobs: tuple[TokenEntry, ...] = ()
    choice: int = 0
    num_tokens: int = field(default=0, compare=False)
    token_ids: tuple[int, ...] = ()


@dataclass(slots=True, frozen=True)
class AnsweredCall:
    """A tool call in an answer. arguments: JSON text as the model wrote it.

    raw: the call's text in the answer. is_complete: the call was not cut before its end.
    """

    id: str
    name: str
    arguments: str
    raw: str
    is_complete: bool


@dataclass(slots=True, frozen=True)
class ToolCallDelta:
    """A piece of a call of one choice. is_first: the call starts; the name never changes.

    arguments, raw: the next part of each, may be empty. whole: the whole call, in its last
    piece. logprobs, token_ids, num_tokens: as in TextDelta; num_tokens may be 0 in a later piece.
    """

    index: int
    id: str
    name: str
    arguments: str = ""
    raw: str = ""
    is_first: bool = False
    whole: AnsweredCall | None = None
    logprobs: tuple[TokenEntry, ...] = ()
    choice: int = 0
    num_tokens: int = field(default=0, compare=False)
    token_ids: tuple[int, ...] = ()


FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(slots=True, frozen=True)
class Finish:
    """The last event of a choice: why its answer ended.

    reason: tool_calls if all calls are complete and the answer was not cut by max_tokens.
    stop_reason: None at an end of turn, else the stop string or token id that matched.
    is_end_of_message: the turn ended with `<|eom_id|>`. logprobs, token_ids: of the tokens after
    the last piece, including the stopping token. usage: of this choice.
    """

    reason: FinishReason
    stop_reason: str | int | None
    usage: Usage
    is_end_of_message: bool = False
    logprobs: tuple[TokenEntry, ...] = ()
    choice: int = 0
    token_ids: tuple[int, ...] = ()


@dataclass(slots=True, frozen=True)
class End:
    """The last event of a request, after the Finish of each of its choices."""

    usage: Usage
    timings: Timings = field(default=Timings(), compare=False)


@dataclass(slots=True, frozen=True)
class PromptLogprobs:
    """The log-probabilities of a prompt, if requested; comes before the pieces of its answers.

    prompt: its index in the request. tokens, entries: one for each token of the prompt.
    """

    prompt: int
    tokens: tuple[TokenText, ...]
    entries: PromptEntries


Delta = TextDelta | ToolCallDelta
ChoiceEvent = Delta | Finish
Event = ChoiceEvent | PromptLogprobs | End
