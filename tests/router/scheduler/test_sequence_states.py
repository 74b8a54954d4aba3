"""The table of a sequence's states: every pair of state and event, and the page that shows it."""

from __future__ import annotations

from itertools import product

import pytest
from support.state_tables import page_section, states_page

from vlmserve.router.errors import IllegalTransitionError
from vlmserve.router.messages import AddRequest
from vlmserve.router.scheduler.sequence import Sequence
from vlmserve.router.scheduler.sequence_states import TRANSITIONS, SequenceEvent, Status

RUN, WAIT, END = Status.RUNNING, Status.WAITING, Status.FINISHED
EXPECTED = {
    (Status.FOLLOWING, SequenceEvent.FORK): RUN,
    (Status.FOLLOWING, SequenceEvent.DETACH): WAIT,
    (Status.FOLLOWING, SequenceEvent.ABORT): END,
    (Status.WAITING, SequenceEvent.ADMIT): RUN,
    (Status.WAITING, SequenceEvent.ABORT): END,
    (Status.RUNNING, SequenceEvent.PREEMPT): WAIT,
    (Status.RUNNING, SequenceEvent.FINISH): END,
    (Status.RUNNING, SequenceEvent.ABORT): END,
    (Status.RUNNING, SequenceEvent.FAIL): END,
}


@pytest.mark.parametrize(("status", "event"), list(product(Status, SequenceEvent)))
def test_every_event_moves_a_sequence_as_the_table_allows_or_raises(status, event):
    sequence = Sequence("a", 1, AddRequest(request_id="a", prompt_token_ids=[1], max_tokens=1))
    sequence.status = status
    if (status, event) in EXPECTED:
        sequence.move(event)
        assert sequence.status is EXPECTED[status, event]
        return
    message = f"Status {status.name} does not allow the event {event.name}"
    with pytest.raises(IllegalTransitionError, match=message):
        sequence.move(event)
    assert sequence.status is status


def test_every_state_can_be_reached_and_every_state_but_the_last_can_be_left():
    reached = {Status.WAITING, Status.FOLLOWING}  # the states of a new leader and a new follower
    while more := {after for state in reached for after in TRANSITIONS[state].values()} - reached:
        reached |= more
    assert reached == set(Status)
    assert [state for state in Status if not TRANSITIONS[state]] == [Status.FINISHED]


def test_the_docs_show_the_table():
    assert page_section(TRANSITIONS, [Status.WAITING, Status.FOLLOWING]) in states_page()
