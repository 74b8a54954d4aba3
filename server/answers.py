"""An answer as it grows: from the engine's outputs to pieces of text and an end.

Owns the events that every API tells of in its own form. Knows nothing of prompts,
images or HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..router.messages import AddRequest, SequenceOutput
from .detokenizer import Detokenizer, Piece, StopStrings
from .errors import InternalError
from .logprobs import PromptEntries, TokenEntry, TokenReader
from .prompt import Processor


@dataclass(slots=True, frozen=True)
class Usage:
    """Tokens of a request, or of one choice; the stopping token counts.

    cached_tokens: those of the prompt that were not computed again.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(slots=True, frozen=True)
class TextDelta:
    """A piece of one choice's answer, never empty.

    logprobs: of the tokens since the last piece, where the request asked. A token
    whose text is held back, as half a character or the start of a stop string,
    is told of with the next piece.
    """

    text: str
    logprobs: tuple[TokenEntry, ...] = ()
    choice: int = 0


@dataclass(slots=True, frozen=True)
class Finish:
    """The last event of a choice: why its answer ended.

    stop_reason: None at an end of turn, else the stop string or token id that
    matched. is_end_of_message: the turn ended by `<|eom_id|>`. logprobs: of the
    tokens after the last piece, the stopping token's among them. usage: of this
    choice.
    """

    reason: Literal["stop", "length"]
    stop_reason: str | int | None
    usage: Usage
    is_end_of_message: bool = False
    logprobs: tuple[TokenEntry, ...] = ()
    choice: int = 0


@dataclass(slots=True, frozen=True)
class End:
    """The last event of a request, behind the Finish of each of its choices.

    prompt_logprobs: an entry a token of the prompt, None where not asked for.
    """

    usage: Usage
    prompt_logprobs: PromptEntries | None = None


Event = TextDelta | Finish | End


@dataclass(slots=True, frozen=True)
class Answer:
    """One choice's whole answer.

    logprobs: one entry for each token that usage counts, where asked.
    """

    text: str
    finish: Finish
    logprobs: tuple[TokenEntry, ...] = ()


@dataclass(slots=True, frozen=True)
class Completion:
    """All answers to a request, in the order of their choices."""

    answers: tuple[Answer, ...]
    usage: Usage
    prompt_logprobs: PromptEntries | None = None


class GrowingAnswer:
    """Turns the engine's outputs for one choice into events."""

    def __init__(
        self,
        request: AddRequest,
        stop: Sequence[str],
        processor: Processor,
        reader: TokenReader,
        choice: int = 0,
    ) -> None:
        self._choice = choice
        self._text = Detokenizer(processor.tokenizer, special_ids=processor.special_ids)
        self._stops = StopStrings(stop)
        self._reader = reader
        self._end_of_message_id = processor.end_of_message_id
        self._num_prompt = len(request.prompt_token_ids)
        self._min_tokens = request.sampling.min_tokens
        self._num_tokens = 0
        self._num_cached = 0
        self._untold: list[TokenEntry] = []

    def take(self, output: SequenceOutput) -> list[Event]:
        """The text that became due, then a Finish if this is the end.

        A stop string ends the answer at the token that completes it: later
        tokens of the same output are neither shown nor counted.
        Raises InternalError if the engine aborted the request.
        """
        if output.finish_reason == "abort":
            raise InternalError("the engine aborted the request")
        self._num_cached += output.num_cached_tokens  # told once, with the first output
        num_shown = len(output.token_ids) - (output.finish_reason == "stop")
        text = ""
        for place in range(num_shown):
            self._count(output, place)
            piece = self._cut(self._text.push(output.token_ids[place]).text)
            text += piece.text
            if piece.stop is not None:
                return [*self._delta(text), self._finish("stop", piece.stop)]
        return self._delta(text) if output.finish_reason is None else self._end(text, output)

    def _count(self, output: SequenceOutput, place: int) -> None:
        self._num_tokens += 1
        if output.logprobs:
            token_id, logprobs = output.token_ids[place], output.logprobs[place]
            self._untold.append(self._reader.entry(token_id, logprobs))

    def _cut(self, text: str) -> Piece:
        """What of the text is due; the text of the first min_tokens tokens stops nothing."""
        if not text or self._num_tokens <= self._min_tokens:
            return Piece(text)
        return self._stops.push(text)

    def _end(self, text: str, output: SequenceOutput) -> list[Event]:
        tail = self._cut(self._text.flush().text)
        held = self._stops.flush() if tail.stop is None else ""
        events = self._delta(text + tail.text + held)
        if output.finish_reason == "stop":
            self._count(output, -1)
        if tail.stop is not None:
            return [*events, self._finish("stop", tail.stop)]
        if output.finish_reason == "length":
            return [*events, self._finish("length", None)]
        is_end_of_message = output.token_ids[-1:] == [self._end_of_message_id]
        return [*events, self._finish("stop", output.stop_token_id, is_end_of_message)]

    def _delta(self, text: str) -> list[Event]:
        return [TextDelta(text, self._tell(), self._choice)] if text else []

    def _finish(
        self,
        reason: Literal["stop", "length"],
        stop_reason: str | int | None,
        is_end_of_message: bool = False,
    ) -> Finish:
        usage = Usage(self._num_prompt, self._num_tokens, self._num_cached)
        logprobs = self._tell()
        return Finish(reason, stop_reason, usage, is_end_of_message, logprobs, self._choice)

    def _tell(self) -> tuple[TokenEntry, ...]:
        """The entries that no event has told of yet."""
        entries = tuple(self._untold)
        self._untold.clear()
        return entries
