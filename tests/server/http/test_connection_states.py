"""The table of a connection's states: closed, reachable, ending, and shown in the docs."""

import itertools
from pathlib import Path

import pytest

from vlmserve.server.http.connection_states import (
    TRANSITIONS,
    ConnectionEvent,
    ConnectionState,
    InvalidTransitionError,
    next_state,
    transition_table,
)

STATES_PAGE = next((Path(__file__).resolve().parents[3] / "docs").rglob("states.md"))


def reachable_from(state):
    found, left = set(), {state}
    while left:
        found |= left
        left = {target for here in left for target in TRANSITIONS[here].values()} - found
    return found


def test_every_state_has_a_row_and_is_reachable_from_a_new_connection():
    assert set(TRANSITIONS) == set(ConnectionState)
    assert reachable_from(ConnectionState.IDLE) == set(ConnectionState)


def test_every_event_occurs_in_some_state_that_is_not_the_last_one():
    used = {
        event
        for state, targets in TRANSITIONS.items()
        if state is not ConnectionState.CLOSED
        for event in targets
    }
    assert used == set(ConnectionEvent)


@pytest.mark.parametrize(
    ("state", "event"), itertools.product(ConnectionState, ConnectionEvent), ids=lambda one: one.name
)
def test_each_pair_goes_where_the_table_says_or_is_a_defect(state, event):
    if event in TRANSITIONS[state]:
        assert next_state(state, event) is TRANSITIONS[state][event]
    else:
        with pytest.raises(InvalidTransitionError, match=f"{event.name}.*{state.name}"):
            next_state(state, event)


@pytest.mark.parametrize("state", ConnectionState, ids=lambda one: one.name)
def test_a_client_may_leave_in_any_state_and_close_ends_any_connection(state):
    assert next_state(state, ConnectionEvent.LOST) is ConnectionState.CLOSED
    after = next_state(state, ConnectionEvent.CLOSE)
    assert next_state(after, ConnectionEvent.CLOSE) is ConnectionState.CLOSED


def test_a_closed_connection_stays_closed():
    assert reachable_from(ConnectionState.CLOSED) == {ConnectionState.CLOSED}


def test_only_a_rejected_request_is_followed_by_a_lingering_close():
    before = {
        state for state, targets in TRANSITIONS.items() if ConnectionState.DRAINING in targets.values()
    }
    assert before == {ConnectionState.REJECTING}


def test_a_request_is_answered_only_after_it_was_read():
    into = {
        (state, event)
        for state, targets in TRANSITIONS.items()
        for event, target in targets.items()
        if target is ConnectionState.ANSWERING
    }
    assert {event for _, event in into} == {ConnectionEvent.REQUEST_READ}


def test_the_docs_show_this_table():
    assert transition_table() in STATES_PAGE.read_text("utf-8")
