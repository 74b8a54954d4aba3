"""How `docs/explanation/states.md` shows a table of states: a diagram, the states, the events.

Owns the form alone. A test of each table asserts that the page contains `page_section(...)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"


def states_page() -> str:
    """The page's text, wherever it lies under docs/."""
    (path,) = DOCS.rglob("states.md")
    return path.read_text()


def page_section(transitions: Mapping[Any, Mapping[Any, Any]], first: list[Any]) -> str:
    """The diagram and both tables of one thing. first: the states that a new one may have.

    The values of both enums are sentences: what a state means, when an event happens.
    """
    states: list[Enum] = list(transitions)
    events: list[Enum] = list(type(next(event for row in transitions.values() for event in row)))
    lines = ["```mermaid", "stateDiagram-v2"]
    lines += [f"    [*] --> {state.name.lower()}" for state in first]
    lines += [
        f"    {state.name.lower()} --> {after.name.lower()}: {event.name.lower()}"
        for state, row in transitions.items()
        for event, after in row.items()
    ]
    lines += [f"    {state.name.lower()} --> [*]" for state in states if not transitions[state]]
    lines += ["```", "", "| State | Meaning |", "|---|---|"]
    lines += [f"| {state.name.lower()} | {state.value} |" for state in states]
    lines += ["", "| Event | From | To | When |", "|---|---|---|---|"]
    lines += [_event_row(transitions, event) for event in events]
    return "\n".join(lines) + "\n"


def _event_row(transitions: Mapping[Any, Mapping[Any, Any]], event: Enum) -> str:
    sources = [state for state, row in transitions.items() if event in row]
    before = ", ".join(state.name.lower() for state in sources)
    after = ", ".join(dict.fromkeys(transitions[state][event].name.lower() for state in sources))
    return f"| {event.name.lower()} | {before} | {after} | {event.value} |"
