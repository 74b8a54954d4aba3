"""The table of a connection's states: every pair of state and event, and the page that shows it."""

from __future__ import annotations

from itertools import product

import pytest
from support.state_tables import page_section, states_page

from vlmserve.router.errors import IllegalTransitionError
from vlmserve.router.state_table import next_state
from vlmserve.server.http.connection_states import TRANSITIONS, ConnectionEvent, ConnectionState

IDLE, HEAD, BODY = (
    ConnectionState.IDLE,
    ConnectionState.READING_HEAD,
    ConnectionState.READING_BODY,
)
ANSWERING, REJECTING = ConnectionState.ANSWERING, ConnectionState.REJECTING
DRAINING, CLOSED = ConnectionState.DRAINING, ConnectionState.CLOSED
EXPECTED = {
    (IDLE, ConnectionEvent.HEAD_STARTED): HEAD,
    (IDLE, ConnectionEvent.REJECTED): REJECTING,
    (HEAD, ConnectionEvent.HEAD_READ): BODY,
    (HEAD, ConnectionEvent.REQUEST_READ): ANSWERING,
    (HEAD, ConnectionEvent.REJECTED): REJECTING,
    (BODY, ConnectionEvent.REQUEST_READ): ANSWERING,
    (BODY, ConnectionEvent.REJECTED): REJECTING,
    (ANSWERING, ConnectionEvent.ANSWERED): IDLE,
    (REJECTING, ConnectionEvent.REJECTED): REJECTING,
    (REJECTING, ConnectionEvent.CLOSE): DRAINING,
    (REJECTING, ConnectionEvent.LOST): CLOSED,
    **{
        (state, event): CLOSED
        for state in (IDLE, HEAD, BODY, ANSWERING, DRAINING)
        for event in (ConnectionEvent.CLOSE, ConnectionEvent.LOST)
    },
}


@pytest.mark.parametrize(("state", "event"), list(product(ConnectionState, ConnectionEvent)))
def test_every_event_moves_a_connection_as_the_table_allows_or_raises(state, event):
    if (state, event) in EXPECTED:
        assert next_state(TRANSITIONS, state, event) is EXPECTED[state, event]
        return
    message = f"ConnectionState {state.name} does not allow the event {event.name}"
    with pytest.raises(IllegalTransitionError, match=message):
        next_state(TRANSITIONS, state, event)


def test_every_state_can_be_reached_and_every_state_but_the_last_can_be_left():
    reached = {IDLE}
    while more := {after for state in reached for after in TRANSITIONS[state].values()} - reached:
        reached |= more
    assert reached == set(ConnectionState)
    assert [state for state in ConnectionState if not TRANSITIONS[state]] == [CLOSED]


def test_only_a_rejected_request_is_followed_by_a_lingering_close():
    before = {state for state, targets in TRANSITIONS.items() if DRAINING in targets.values()}
    assert before == {REJECTING}


def test_the_docs_show_the_table():
    assert page_section(TRANSITIONS, [IDLE]) in states_page()
