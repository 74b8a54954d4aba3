"""How a thing with states moves between them: a table, and one function that reads it.

    TRANSITIONS = {state: {event: next state}}

Owns the lookup and its error. A state without an entry is final; an event that a state does not
list is illegal there. Each owner keeps its own table: sequences in `scheduler/sequence_states.py`,
supervised children and HTTP connections in `server/`. `docs/explanation/states.md` shows them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

from .errors import IllegalTransitionError

State = TypeVar("State", bound=Enum)
Event = TypeVar("Event", bound=Enum)


def next_state(
    transitions: Mapping[State, Mapping[Event, State]], state: State, event: Event
) -> State:
    """The state after `event`. Raises IllegalTransitionError if `state` does not allow it."""
    try:
        return transitions[state][event]
    except KeyError:
        kind = type(state).__name__
        raise IllegalTransitionError(
            f"{kind} {state.name} does not allow the event {event.name}"
        ) from None
