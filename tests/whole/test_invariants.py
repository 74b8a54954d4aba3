"""The standing assertions themselves: they notice what they are there to notice."""

import json
import os
import signal
from collections import Counter

import pytest
from support.invariants import (
    CHAT,
    GENERATION_ROUTES,
    PICTURE,
    Answer,
    Snapshot,
    assert_error,
    assert_stream_error,
    body_for,
)


@pytest.mark.parametrize("route", GENERATION_ROUTES)
def test_every_generating_route_answers_its_body_and_refuses_nonsense(standing, route):
    assert standing.post(route, body_for(route, images=[PICTURE])).status == 200
    assert_error(standing.post(route, b"{"), 400)


def test_the_tree_is_one_supervisor_worker_engine_and_two_decoders(standing):
    kinds = standing.snapshot().children
    single = ("supervisor", "worker", "engine")
    assert [kinds.pop(kind) for kind in (*single, "decoder")] == [1, 1, 1, 2]
    assert not kinds
    assert standing.snapshot().descriptors["worker"] > 5


def test_a_stopped_engine_fails_the_probe_and_a_running_request_the_return(session_standing):
    standing = session_standing
    base = standing.settled()
    standing.slack, before = 0.5, standing.slack
    os.kill(standing.engine_pid, signal.SIGSTOP)
    try:
        with pytest.raises(TimeoutError):
            standing.probe()
    finally:
        os.kill(standing.engine_pid, signal.SIGCONT)
        standing.slack = before
    standing.assert_returned(base)


def test_what_is_not_back_is_named():
    base = Snapshot({1}, _count(worker=1), _count(worker=9), {"num_requests_running": 0.0})
    after = Snapshot({1}, _count(worker=2), _count(worker=10), {"num_requests_running": 1.0})
    assert base.exceeds(base) == []
    assert len(after.exceeds(base)) == 3


def test_an_error_in_another_form_is_no_error_body():
    with pytest.raises(AssertionError):
        assert_error(Answer(400, {"content-type": "text/plain"}, b"no"), 400)
    with pytest.raises(AssertionError):
        assert_error(Answer(200, {"content-type": "application/json"}, b"{}"), 400)
    frames = [{"choices": []}, {"error": {"message": "gone", "type": "x"}}]
    body = b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in frames)
    assert assert_stream_error(Answer(200, {}, body + b"data: [DONE]\n\n"))["message"] == "gone"
    with pytest.raises(KeyError):
        assert_stream_error(Answer(200, {}, b'data: {"choices": []}\n\ndata: [DONE]\n\n'))


def _count(**kinds):
    return Counter(kinds)


def test_bodies_of_unknown_routes_are_refused():
    with pytest.raises(AssertionError, match="add it"):
        body_for(CHAT + "/elsewhere")
