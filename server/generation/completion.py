"""Whole answers: the events of a request, joined.

Knows nothing of how answers are generated or sent.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import AsyncIterable
from dataclasses import dataclass

from .events import (
    AnsweredCall,
    ChoiceEvent,
    End,
    Event,
    Finish,
    PromptLogprobs,
    TextDelta,
    Usage,
)
from .token_text import TokenEntry


@dataclass(slots=True, frozen=True)
class Answer:
    """The whole answer of one choice.

    logprobs: one entry for each token that usage counts, if requested.
    """

    text: str
    finish: Finish
    logprobs: tuple[TokenEntry, ...] = ()
    tool_calls: tuple[AnsweredCall, ...] = ()


@dataclass(slots=True, frozen=True)
class Completion:
    """All answers to a request, in the order of their choices.

    prompts: in the order in which the client sent them, if it requested their log-probabilities.
    """

    answers: tuple[Answer, ...]
    usage: Usage
    prompts: tuple[PromptLogprobs, ...] = ()

    @classmethod
    async def collect(cls, events: AsyncIterable[Event]) -> Completion:
        """Join all events of one request, which end with an End, as they come."""
        choices: defaultdict[int, _Choice] = defaultdict(_Choice)
        prompts: list[PromptLogprobs] = []
        async for event in events:
            if isinstance(event, End):
                answers = tuple(choices[choice].answer() for choice in sorted(choices))
                prompts.sort(key=lambda logprobs: logprobs.prompt)
                return cls(answers, event.usage, tuple(prompts))
            if isinstance(event, PromptLogprobs):
                prompts.append(event)
            else:
                choices[event.choice].add(event)
        raise AssertionError("the events of a request end with an End")

    @property
    def num_logprobs(self) -> int:
        """How many log-probabilities the answers and prompts have, all candidates included."""
        of_answers = sum(1 + len(entry.top) for answer in self.answers for entry in answer.logprobs)
        of_prompts = sum(
            len(entry or ()) for logprobs in self.prompts for entry in logprobs.entries
        )
        return of_answers + of_prompts


class _Choice:
    """The answer of one choice as it grows: no event is kept, and the text is one buffer."""

    __slots__ = ("_calls", "_finish", "_logprobs", "_text")

    def __init__(self) -> None:
        self._text = io.StringIO()
        self._logprobs: list[TokenEntry] = []
        self._calls: list[AnsweredCall] = []
        self._finish: Finish | None = None

    def add(self, event: ChoiceEvent) -> None:
        self._logprobs += event.logprobs
        if isinstance(event, TextDelta):
            self._text.write(event.text)
        elif isinstance(event, Finish):
            self._finish = event
        elif event.whole is not None:
            self._calls.append(event.whole)

    def answer(self) -> Answer:
        assert self._finish is not None, "each choice has a Finish before the End"
        text = self._text.getvalue()
        return Answer(text, self._finish, tuple(self._logprobs), tuple(self._calls))
