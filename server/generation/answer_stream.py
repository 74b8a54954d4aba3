"""Turns the engine's outputs for one choice into events: pieces of text and calls, then a Finish.

First ToolCallStream (text to pieces of calls), then AnswerStream (tokens to events). Knows nothing
of prompts, images or HTTP.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ...router.messages import AddRequest, SequenceOutput
from ..errors import DeadEndError, InternalError
from ..prompts.processor import Processor
from .completion import EntryLog
from .detokenizer import Detokenizer, Piece, StopStrings
from .events import (
    AnsweredCall,
    Delta,
    Event,
    Finish,
    FinishReason,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from .request import TEXT_AS_USUAL, TextOptions
from .token_text import TokenEntry, TokenReader
from .tool_calls.parser import ToolCallParser
from .tool_calls.pieces import CallPiece, ParsedPiece, TextPiece


@dataclass(slots=True)
class _OpenCall:
    """A call that the model is still writing."""

    id: str
    name: str
    arguments: list[str] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)

    def whole(self, is_complete: bool) -> AnsweredCall:
        arguments, raw = "".join(self.arguments), "".join(self.raw)
        return AnsweredCall(self.id, self.name, arguments, raw, is_complete)


class ToolCallStream:
    """Turns an answer's text into pieces of text and of calls; each call gets its own id."""

    def __init__(self, parser: ToolCallParser, choice: int) -> None:
        self._parser = parser
        self._choice = choice
        self._open: _OpenCall | None = None
        self._index = -1
        self._num_complete = 0

    @property
    def is_done(self) -> bool:
        """The maximum number of calls is complete."""
        return self._parser.is_done

    @property
    def has_called(self) -> bool:
        """There is at least one call, and all are complete."""
        return 0 < self._num_complete == self._index + 1

    def text(self, text: str) -> list[Delta]:
        """Add text; return the pieces that are now certain."""
        return self._deltas(self._parser.push(text))

    def python_tag(self) -> list[Delta]:
        """Add the special token; return the pieces that are now certain."""
        return self._deltas(self._parser.push_python_tag())

    def flush(self) -> list[Delta]:
        """The rest at the end of the answer; a cut call is reported as it is."""
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
        assert call is not None, "a parser sends the name of a call first"
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


class _Pending(NamedTuple):
    """Of the tokens since the last event, each only if requested."""

    logprobs: tuple[TokenEntry, ...]
    token_ids: tuple[int, ...]


class AnswerStream:
    """Turns the engine's outputs for one choice into events.

    tool_parser: finds calls in the text; None: there are no calls, only text. options: how tokens
    become text. form: the field of the form that it must have. log: where log-probabilities go;
    None: with the events.
    """

    def __init__(
        self,
        request: AddRequest,
        stop: Sequence[str],
        processor: Processor,
        reader: TokenReader,
        choice: int = 0,
        tool_parser: ToolCallParser | None = None,
        *,
        options: TextOptions = TEXT_AS_USUAL,
        form: str = "",
        log: EntryLog | None = None,
    ) -> None:
        self._form = form
        self._choice = choice
        self._keeps_stop = options.keeps_stop
        self._has_token_ids = options.has_token_ids
        self._text = Detokenizer(
            processor.tokenizer, processor.special_ids, shows_special=options.shows_special
        )
        self._stops = StopStrings(stop)
        self._calls = None if tool_parser is None else ToolCallStream(tool_parser, choice)
        self._reader = reader
        self._end_of_message_id = processor.end_of_message_id
        self._python_tag_id = processor.python_tag_id
        self._num_prompt = len(request.prompt_token_ids)
        self._min_tokens = request.sampling.min_tokens
        self._num_tokens = 0
        self._num_cached = 0
        self._log = log
        self._pending_logprobs: list[TokenEntry] = []
        self._pending_ids: list[int] = []

    def take(self, output: SequenceOutput) -> list[Event]:
        """Add an output; return the pieces that are now certain, then a Finish at the end.

        The token that completes a stop string, or the last allowed call, ends the answer: later
        tokens of the same output are neither returned nor counted.
        Raises DeadEndError if no token can follow in its form; InternalError if the engine aborted
        the request.
        """
        if output.finish_reason == "abort" and self._form:
            raise DeadEndError(self._form)
        if output.finish_reason == "abort":
            raise InternalError("the engine aborted the request")
        self._num_cached += output.num_cached_tokens  # reported once, with the first output
        num_shown = len(output.token_ids) - self._hides_last(output)
        events: list[Event] = []
        text = ""
        for place in range(num_shown):
            self._count(output, place)
            token_id = output.token_ids[place]
            if token_id == self._python_tag_id and self._calls is not None:
                events += self._delta(text + self._stops.flush())
                events += self._with_logprobs(self._calls.python_tag())
                text = ""
            piece = self._cut(self._text.push(token_id))
            text += piece.text
            if piece.stop is not None:
                text += piece.stop if self._keeps_stop else ""
                return [*events, *self._delta(text), *self._finish("stop", piece.stop)]
            if self._calls is not None:
                events += self._delta(text)
                text = ""
                if self._calls.is_done:
                    return [*events, *self._finish("stop", None)]
        rest = self._delta(text) if output.finish_reason is None else self._end(text, output)
        return [*events, *rest]

    def _hides_last(self, output: SequenceOutput) -> bool:
        """The output's last token ended the answer and is no part of its text."""
        return output.finish_reason == "stop" and not self._keeps_stop

    def _count(self, output: SequenceOutput, place: int) -> None:
        self._num_tokens += 1
        token_id = output.token_ids[place]
        if self._has_token_ids:
            self._pending_ids.append(token_id)
        if output.logprobs:
            entry = self._reader.entry(token_id, output.logprobs[place])
            if self._log is None:
                self._pending_logprobs.append(entry)
            else:
                self._log.add((entry,))

    def _cut(self, text: str) -> Piece:
        """The certain part of the text; the first min_tokens tokens match no stop string."""
        if not text or self._num_tokens <= self._min_tokens:
            return Piece(text)
        return self._stops.push(text)

    def _end(self, text: str, output: SequenceOutput) -> list[Event]:
        tail = self._cut(self._text.flush())
        rest = self._stops.flush() if tail.stop is None else ""
        kept = tail.stop if tail.stop is not None and self._keeps_stop else ""
        events = self._delta(text + tail.text + rest + kept)
        if self._hides_last(output):
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
            return self._with_logprobs(self._calls.text(text))
        logprobs, token_ids = self._take_pending()
        return [TextDelta(text, logprobs, self._choice, self._num_tokens, token_ids)]

    def _with_logprobs(self, deltas: Sequence[Delta]) -> list[Event]:
        """The same deltas, the first with all that is known of the tokens since the last one."""
        if not deltas:
            return []
        logprobs, token_ids = self._take_pending()
        first = replace(
            deltas[0], logprobs=logprobs, token_ids=token_ids, num_tokens=self._num_tokens
        )
        return [first, *deltas[1:]]

    def _finish(
        self,
        reason: FinishReason,
        stop_reason: str | int | None,
        is_end_of_message: bool = False,
    ) -> list[Event]:
        """The rest of the calls, and the Finish."""
        events: list[Event] = []
        if self._calls is not None:
            events += self._with_logprobs(self._calls.flush())
            if reason == "stop" and self._calls.has_called:
                reason = "tool_calls"
        usage = Usage(self._num_prompt, self._num_tokens, self._num_cached)
        pending = self._take_pending()
        end = Finish(
            reason,
            stop_reason,
            usage,
            is_end_of_message,
            pending.logprobs,
            self._choice,
            pending.token_ids,
        )
        return [*events, end]

    def _take_pending(self) -> _Pending:
        """Return and clear what no event has reported yet."""
        pending = _Pending(tuple(self._pending_logprobs), tuple(self._pending_ids))
        self._pending_logprobs.clear()
        self._pending_ids.clear()
        return pending
