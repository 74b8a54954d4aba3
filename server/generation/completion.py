"""Whole answers: the events of a request, joined.

Knows nothing of how answers are generated or sent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from .events import (
    AnsweredCall,
    ChoiceEvent,
    End,
    Event,
    Finish,
    PromptLogprobs,
    TextDelta,
    ToolCallDelta,
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
    def of_events(cls, events: Iterable[Event]) -> Completion:
        """Join all events of one request, which end with an End."""
        choices: defaultdict[int, list[ChoiceEvent]] = defaultdict(list)
        prompts: list[PromptLogprobs] = []
        for event in events:
            if isinstance(event, End):
                answers = tuple(_answer(choices[choice]) for choice in sorted(choices))
                prompts.sort(key=lambda logprobs: logprobs.prompt)
                return cls(answers, event.usage, tuple(prompts))
            if isinstance(event, PromptLogprobs):
                prompts.append(event)
            else:
                choices[event.choice].append(event)
        raise AssertionError("the events of a request end with an End")

    @property
    def num_logprobs(self) -> int:
        """How many log-probabilities the answers and prompts have, all candidates included."""
        of_answers = sum(1 + len(entry.top) for answer in self.answers for entry in answer.logprobs)
        of_prompts = sum(
            len(entry or ()) for logprobs in self.prompts for entry in logprobs.entries
        )
        return of_answers + of_prompts


def _answer(events: list[ChoiceEvent]) -> Answer:
    finish = events[-1]
    assert isinstance(finish, Finish), "each choice has a Finish before the End"
    return Answer(
        "".join(event.text for event in events if isinstance(event, TextDelta)),
        finish,
        tuple(entry for event in events for entry in event.logprobs),
        tuple(
            event.whole
            for event in events
            if isinstance(event, ToolCallDelta) and event.whole is not None
        ),
    )
