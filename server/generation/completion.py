"""Whole answers: the events of a request, joined.

Knows nothing of how answers are generated or sent.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import AsyncIterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .events import (
    AnsweredCall,
    ChoiceEvent,
    End,
    Event,
    Finish,
    PromptLogprobs,
    TextDelta,
    Timings,
    Usage,
)
from .token_text import TokenEntry


class EntryLog(Protocol):
    """The log-probabilities of a growing answer, in an API's JSON from the start.

    A token with 20 candidates takes 2 KB as objects, three times its JSON.
    """

    @property
    def num_entries(self) -> int: ...
    def add(self, entries: Sequence[TokenEntry]) -> None: ...
    def as_json(self) -> Any: ...


@dataclass(slots=True, frozen=True)
class Answer:
    """The whole answer of one choice.

    logprobs: the log of each token that usage counts; None if not requested. token_ids: of the same
    tokens, if requested.
    """

    text: str
    finish: Finish
    logprobs: EntryLog | None = None
    tool_calls: tuple[AnsweredCall, ...] = ()
    token_ids: tuple[int, ...] = ()

    @property
    def logged_entries(self) -> Any:
        """What the log contains, for the API's JSON; None without an entry."""
        log = self.logprobs
        return None if log is None or not log.num_entries else log.as_json()


@dataclass(slots=True, frozen=True)
class Completion:
    """All answers to a request, in the order of their choices.

    prompts: in the order in which the client sent them, if it requested their log-probabilities.
    """

    answers: tuple[Answer, ...]
    usage: Usage
    prompts: tuple[PromptLogprobs, ...] = ()
    timings: Timings = field(default=Timings(), compare=False)

    @classmethod
    async def collect(
        cls, events: AsyncIterable[Event], logs: Mapping[int, EntryLog] | None = None
    ) -> Completion:
        """Join all events of one request, which end with an End, as they come.

        logs: each choice's log, which the stream has filled; the events have no entries then.
        """
        logs = logs or {}
        choices: defaultdict[int, _Choice] = defaultdict(_Choice)
        prompts: list[PromptLogprobs] = []
        async for event in events:
            if isinstance(event, End):
                answers = tuple(
                    choices[choice].answer(logs.get(choice)) for choice in sorted(choices)
                )
                prompts.sort(key=lambda logprobs: logprobs.prompt)
                return cls(answers, event.usage, tuple(prompts), event.timings)
            if isinstance(event, PromptLogprobs):
                prompts.append(event)
            else:
                choices[event.choice].add(event)
        raise AssertionError("the events of a request end with an End")

    @property
    def num_prompt_logprobs(self) -> int:
        """How many log-probabilities the prompts have, all candidates included."""
        return sum(len(entry or ()) for logprobs in self.prompts for entry in logprobs.entries)


class _Choice:
    """The answer of one choice as it grows: no event is kept, and the text is one buffer."""

    __slots__ = ("_calls", "_finish", "_text", "_token_ids")

    def __init__(self) -> None:
        self._text = io.StringIO()
        self._token_ids: list[int] = []
        self._calls: list[AnsweredCall] = []
        self._finish: Finish | None = None

    def add(self, event: ChoiceEvent) -> None:
        self._token_ids += event.token_ids
        if isinstance(event, TextDelta):
            self._text.write(event.text)
        elif isinstance(event, Finish):
            self._finish = event
        elif event.whole is not None:
            self._calls.append(event.whole)

    def answer(self, log: EntryLog | None) -> Answer:
        assert self._finish is not None, "each choice has a Finish before the End"
        calls, token_ids = tuple(self._calls), tuple(self._token_ids)
        return Answer(self._text.getvalue(), self._finish, log, calls, token_ids)
