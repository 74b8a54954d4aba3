"""The table of a supervised child's states: every pair of state and event, and the page."""

from __future__ import annotations

from itertools import product

import pytest
from support.state_tables import page_section, states_page

from vlmserve.router.errors import IllegalTransitionError
from vlmserve.server.supervisor.child_states import TRANSITIONS, ChildEvent, ChildState
from vlmserve.server.supervisor.restart_budget import RestartBudget
from vlmserve.server.supervisor.supervisor import ChildSlot

S, E = ChildState, ChildEvent
EXPECTED = {
    (S.STARTING, E.READY): S.SERVING,
    (S.STARTING, E.END): S.ENDED,
    (S.STARTING, E.STOP): S.STOPPED,
    (S.SERVING, E.READY): S.SERVING,
    (S.SERVING, E.END): S.ENDED,
    (S.SERVING, E.STOP): S.STOPPED,
    (S.ENDED, E.RESTART): S.STARTING,
    (S.ENDED, E.SUSPEND): S.SUSPENDED,
    (S.ENDED, E.GIVE_UP): S.FAILED,
    (S.ENDED, E.STOP): S.STOPPED,
    (S.SUSPENDED, E.RESTART): S.STARTING,
    (S.SUSPENDED, E.STOP): S.STOPPED,
}


@pytest.mark.parametrize(("state", "event"), list(product(S, E)))
def test_every_event_moves_a_child_as_the_table_allows_or_raises(state, event):
    slot = ChildSlot(name="a worker", restarts=RestartBudget(5, 300), state=state)
    if (state, event) in EXPECTED:
        slot.move(event)
        assert slot.state is EXPECTED[state, event]
        return
    with pytest.raises(IllegalTransitionError, match=f"ChildState {state.name} does not allow"):
        slot.move(event)
    assert slot.state is state


def test_every_state_can_be_reached_and_every_state_but_the_last_two_can_be_left():
    reached = {S.STARTING}
    while more := {after for state in reached for after in TRANSITIONS[state].values()} - reached:
        reached |= more
    assert reached == set(S)
    assert [state for state in S if not TRANSITIONS[state]] == [S.FAILED, S.STOPPED]


def test_the_docs_show_the_table():
    assert page_section(TRANSITIONS, [S.STARTING]) in states_page()
