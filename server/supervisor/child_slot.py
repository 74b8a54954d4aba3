"""One place for a child of the supervisor: its state, its process, its restarts, and its ends."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from ...router.config import EngineConfig
from ...router.messages import EngineReady
from ...router.state_table import next_state
from ..children.processes import ChildStartError
from .child import Child
from .child_states import TRANSITIONS, ChildEvent, ChildState
from .restart_budget import RestartBudget
from .restart_counter import RestartReason

# A child that exits with 2 or 3 has logged the reason.
EXIT_CODES_WITH_REASON_LOGGED = (2, 3)


class ChildFailedError(Exception):
    """The supervisor gave up on a child. message: for the operator; None if already logged."""


@dataclass(slots=True, frozen=True)
class ChildEnd:
    """How a process ended, or why none started. exit_code: None if none started."""

    cause: str
    reason: RestartReason = "ended"
    exit_code: int | None = None

    @classmethod
    def of(cls, child: Child, reason: RestartReason) -> ChildEnd:
        """The end of a process that has ended."""
        return cls(child.how_it_ended, reason, child.exit_code)

    @classmethod
    def not_started(cls, error: ChildStartError) -> ChildEnd:
        """The system could not start a process."""
        return cls(f"the system cannot start it: {error}")

    @property
    def has_started(self) -> bool:
        return self.exit_code is not None


@dataclass(slots=True, kw_only=True)
class ChildSlot:
    """One place for a child: its state, its current process and its restarts."""

    name: str
    restarts: RestartBudget
    child: Child | None = None
    state: ChildState = ChildState.STARTING

    def move(self, event: ChildEvent) -> None:
        """Change the state by the table in `child_states.py`."""
        self.state = next_state(TRANSITIONS, self.state, event)


@dataclass(slots=True, kw_only=True)
class EngineSlot(ChildSlot):
    """The place of one engine. info: set once the engine has been ready for the first time."""

    config: EngineConfig
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    info: EngineReady | None = None


def why_not_ready(name: str, end: ChildEnd) -> str | None:
    """Why the supervisor gives up on a first start; None if the child has logged it."""
    if end.exit_code in EXIT_CODES_WITH_REASON_LOGGED:
        return None
    return f"{name} ended ({end.cause}) before it was ready: giving up"


def too_many_ends(slot: ChildSlot, end: ChildEnd) -> str:
    """For the log: how often a child ended, and the last cause."""
    budget = slot.restarts
    last = f"last by {end.cause}" if end.has_started else end.cause
    return f"{slot.name} ended {budget.max_restarts + 1} times in {budget.window_s:g} s, {last}"
