"""An answer as it grows: from the engine's outputs to pieces of text and an end.

Owns the events that every API tells of in its own form. Knows nothing of prompts,
images or HTTP.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ...router.messages import AddRequest, SequenceOutput
from ..errors import InternalError
from ..prompts.processor import Processor
from .detokenizer import Detokenizer, Piece, StopStrings
from .token_text import PromptEntries, TokenEntry, TokenReader, TokenText
from .tool_calls.parser import ToolCallParser
from .tool_calls.pieces import CallPiece, ParsedPiece, TextPiece


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
class AnsweredCall:
    """A call that an answer makes. arguments: JSON text as the model wrote it.

    raw: what stood in the answer. is_complete: it was not cut before its end.
    """

    id: str
    name: str
    arguments: str
    raw: str
    is_complete: bool


@dataclass(slots=True, frozen=True)
class ToolCallDelta:
    """A piece of a call of one choice. is_first: the call begins; name stays the same.

    arguments, raw: the next part of each, may be empty. whole: the call at its end.
    logprobs: as in TextDelta.
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


FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(slots=True, frozen=True)
class Finish:
    """The last event of a choice: why its answer ended.

    reason: tool_calls where it ended by itself, or was cut behind its last call.
    stop_reason: None at an end of turn, else the stop string or token id that
    matched. is_end_of_message: the turn ended by `<|eom_id|>`. logprobs: of the
    tokens after the last piece, the stopping token's among them. usage: of this
    choice.
    """

    reason: FinishReason
    stop_reason: str | int | None
    usage: Usage
    is_end_of_message: bool = False
    logprobs: tuple[TokenEntry, ...] = ()
    choice: int = 0


@dataclass(slots=True, frozen=True)
class End:
    """The last event of a request, behind the Finish of each of its choices."""

    usage: Usage


@dataclass(slots=True, frozen=True)
class PromptTold:
    """What the model said of a prompt, where the request asked: before its answers' pieces.

    prompt: its number in the request. tokens, entries: one a token of the prompt.
    """

    prompt: int
    tokens: tuple[TokenText, ...]
    entries: PromptEntries


Delta = TextDelta | ToolCallDelta
ChoiceEvent = Delta | Finish
Event = ChoiceEvent | PromptTold | End


@dataclass(slots=True, frozen=True)
class Answer:
    """One choice's whole answer.

    logprobs: one entry for each token that usage counts, where asked.
    """

    text: str
    finish: Finish
    logprobs: tuple[TokenEntry, ...] = ()
    tool_calls: tuple[AnsweredCall, ...] = ()


class GatheredAnswer:
    """Joins the events of one choice."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._logprobs: list[TokenEntry] = []
        self._calls: list[AnsweredCall] = []
        self._finish: Finish | None = None

    def add(self, event: ChoiceEvent) -> None:
        self._logprobs += event.logprobs
        if isinstance(event, TextDelta):
            self._texts.append(event.text)
        elif isinstance(event, Finish):
            self._finish = event
        elif event.whole is not None:
            self._calls.append(event.whole)

    def whole(self) -> Answer:
        """The answer, of which the Finish has been added."""
        assert self._finish is not None, "each choice has a Finish before the End"
        return Answer("".join(self._texts), self._finish, tuple(self._logprobs), tuple(self._calls))


@dataclass(slots=True, frozen=True)
class Completion:
    """All answers to a request, in the order of their choices.

    prompts: in the order in which they were sent, where the request asked.
    """

    answers: tuple[Answer, ...]
    usage: Usage
    prompts: tuple[PromptTold, ...] = ()

    @property
    def num_logprobs(self) -> int:
        """How many log-probabilities are told, of candidates that were not chosen too."""
        of_answers = sum(1 + len(entry.top) for one in self.answers for entry in one.logprobs)
        return of_answers + sum(len(entry or ()) for one in self.prompts for entry in one.entries)


@dataclass(slots=True)
class _OpenCall:
    """A call that is being written."""

    id: str
    name: str
    arguments: list[str] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)

    def whole(self, is_complete: bool) -> AnsweredCall:
        arguments, raw = "".join(self.arguments), "".join(self.raw)
        return AnsweredCall(self.id, self.name, arguments, raw, is_complete)


class GrowingCalls:
    """Turns an answer's text into pieces of text and of calls, each with an id of its own."""

    def __init__(self, parser: ToolCallParser, choice: int) -> None:
        self._parser = parser
        self._choice = choice
        self._open: _OpenCall | None = None
        self._index = -1
        self._num_complete = 0

    @property
    def is_done(self) -> bool:
        """As many calls as are allowed are complete."""
        return self._parser.is_done

    @property
    def has_called(self) -> bool:
        """There are calls, and none was cut."""
        return 0 < self._num_complete == self._index + 1

    def text(self, text: str) -> list[Delta]:
        """What became certain with this text."""
        return self._deltas(self._parser.push(text))

    def python_tag(self) -> list[Delta]:
        """The same for the special token."""
        return self._deltas(self._parser.push_python_tag())

    def flush(self) -> list[Delta]:
        """What is left at the end; a call that was cut is told of as it is."""
        return [*self._deltas(self._parser.flush()), *self._close(is_complete=False)]

    def _deltas(self, pieces: Sequence[ParsedPiece]) -> list[Delta]:
        deltas: list[Delta] = []
        for piece in pieces:
            if isinstance(piece, TextPiece):
                deltas.append(TextDelta(piece.text, choice=self._choice))
            else:
                deltas += self._call(piece)
        return deltas

    def _call(self, piece: CallPiece) -> list[Delta]:
        deltas: list[Delta] = []
        if piece.name is not None:
            deltas += self._close(is_complete=False)
            self._open = _OpenCall(f"call_{uuid.uuid4().hex[:24]}", piece.name)
            self._index = piece.index
        call = self._open
        assert call is not None, "a parser names a call first"
        call.arguments.append(piece.arguments)
        call.raw.append(piece.raw)
        is_first = piece.name is not None
        delta = self._delta(call, piece.arguments, piece.raw, is_first=is_first)
        return [*deltas, delta, *(self._close(is_complete=True) if piece.is_end else [])]

    def _close(self, is_complete: bool) -> list[Delta]:
        if self._open is None:
            return []
        call, self._open = self._open, None
        self._num_complete += is_complete
        return [self._delta(call, whole=call.whole(is_complete))]

    def _delta(
        self,
        call: _OpenCall,
        arguments: str = "",
        raw: str = "",
        is_first: bool = False,
        whole: AnsweredCall | None = None,
    ) -> ToolCallDelta:
        return ToolCallDelta(
            self._index, call.id, call.name, arguments, raw, is_first, whole, choice=self._choice
        )


class GrowingAnswer:
    """Turns the engine's outputs for one choice into events.

    tool_parser: finds calls in the text; None leaves all of it text.
    """

    def __init__(
        self,
        request: AddRequest,
        stop: Sequence[str],
        processor: Processor,
        reader: TokenReader,
        choice: int = 0,
        tool_parser: ToolCallParser | None = None,
    ) -> None:
        self._choice = choice
        self._text = Detokenizer(processor.tokenizer, processor.special_ids)
        self._stops = StopStrings(stop)
        self._calls = None if tool_parser is None else GrowingCalls(tool_parser, choice)
        self._reader = reader
        self._end_of_message_id = processor.end_of_message_id
        self._python_tag_id = processor.python_tag_id
        self._num_prompt = len(request.prompt_token_ids)
        self._min_tokens = request.sampling.min_tokens
        self._num_tokens = 0
        self._num_cached = 0
        self._untold: list[TokenEntry] = []

    def take(self, output: SequenceOutput) -> list[Event]:
        """The pieces that became due, then a Finish if this is the end.

        A stop string ends the answer at the token that completes it, and so does the
        last call that is allowed: later tokens of the same output are neither shown
        nor counted.
        Raises InternalError if the engine aborted the request.
        """
        if output.finish_reason == "abort":
            raise InternalError("the engine aborted the request")
        self._num_cached += output.num_cached_tokens  # told once, with the first output
        num_shown = len(output.token_ids) - (output.finish_reason == "stop")
        events: list[Event] = []
        text = ""
        for place in range(num_shown):
            self._count(output, place)
            token_id = output.token_ids[place]
            if token_id == self._python_tag_id and self._calls is not None:
                events += self._delta(text + self._stops.flush())
                events += self._told(self._calls.python_tag())
                text = ""
            piece = self._cut(self._text.push(token_id))
            text += piece.text
            if piece.stop is not None:
                return [*events, *self._delta(text), *self._finish("stop", piece.stop)]
            if self._calls is not None:
                events += self._delta(text)
                text = ""
                if self._calls.is_done:
                    return [*events, *self._finish("stop", None)]
        rest = self._delta(text) if output.finish_reason is None else self._end(text, output)
        return [*events, *rest]

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
        tail = self._cut(self._text.flush())
        held = self._stops.flush() if tail.stop is None else ""
        events = self._delta(text + tail.text + held)
        if output.finish_reason == "stop":
            self._count(output, -1)
        if tail.stop is not None:
            return [*events, *self._finish("stop", tail.stop)]
        if output.finish_reason == "length":
            return [*events, *self._finish("length", None)]
        is_end_of_message = output.token_ids[-1:] == [self._end_of_message_id]
        return [*events, *self._finish("stop", output.stop_token_id, is_end_of_message)]

    def _delta(self, text: str) -> list[Event]:
        if not text:
            return []
        if self._calls is not None:
            return self._told(self._calls.text(text))
        return [TextDelta(text, self._tell(), self._choice)]

    def _told(self, deltas: Sequence[Delta]) -> list[Event]:
        """The same, the first with the entries that no event has told of."""
        if not deltas:
            return []
        return [replace(deltas[0], logprobs=self._tell()), *deltas[1:]]

    def _finish(
        self,
        reason: FinishReason,
        stop_reason: str | int | None,
        is_end_of_message: bool = False,
    ) -> list[Event]:
        """What is still held, and the Finish."""
        events: list[Event] = []
        if self._calls is not None:
            events += self._told(self._calls.flush())
            if reason == "stop" and self._calls.has_called:
                reason = "tool_calls"
        usage = Usage(self._num_prompt, self._num_tokens, self._num_cached)
        logprobs = self._tell()
        end = Finish(reason, stop_reason, usage, is_end_of_message, logprobs, self._choice)
        return [*events, end]

    def _tell(self) -> tuple[TokenEntry, ...]:
        """The entries that no event has told of yet."""
        entries = tuple(self._untold)
        self._untold.clear()
        return entries
