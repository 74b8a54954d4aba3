"""1,300 unfinished heads of one client at a real server with its own defaults."""

from __future__ import annotations

import contextlib
import resource
import socket

import pytest
from support.invariants import CHAT, Standing, body_for

NUM_HEADS = 1_300
NUM_REQUESTS = 60


@pytest.fixture
def many_descriptors():
    """This process may open a connection for each head."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = NUM_HEADS + 500
    if before[0] < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.slow
def test_row_04_1300_half_open_heads_cost_others_nothing(
    start_faulty_server, many_descriptors
) -> None:
    """28 % of all other requests got a 503, health included."""
    standing = Standing(start_faulty_server(), is_warm=True)
    with standing.holds(), contextlib.ExitStack() as stack:
        for number in range(NUM_HEADS):
            one = socket.create_connection(("127.0.0.1", standing.server.port), 60)
            stack.enter_context(one)
            one.sendall(b"GET /v1/models HTTP/1.1\r\nHost: ")
            if number % (NUM_HEADS // NUM_REQUESTS) == 0:
                assert standing.post(CHAT, body_for(CHAT)).status == 200
                assert standing.get("/v1/health/live").status == 200
                assert standing.get("/v1/health/ready").status == 200
        for _ in range(NUM_REQUESTS):
            assert standing.post(CHAT, body_for(CHAT)).status == 200
