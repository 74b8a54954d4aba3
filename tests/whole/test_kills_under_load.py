"""kill -9 of workers and engines under load, with two of each: no client hangs."""

from __future__ import annotations

import http.client
import os
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.invariants import CHAT, Standing, assert_error, assert_stream_error, body_for

NUM_CLIENTS = 8


class Load:
    """Clients that ask again and again until stopped, every other one for a stream."""

    def __init__(self, standing: Standing) -> None:
        self._standing = standing
        self._stop = threading.Event()
        self.ends: Counter[str] = Counter()
        self._pool = ThreadPoolExecutor(NUM_CLIENTS)
        self._clients = [
            self._pool.submit(self._ask_on, bool(number % 2)) for number in range(NUM_CLIENTS)
        ]

    def _ask_on(self, stream: bool) -> None:
        body = body_for(CHAT, max_tokens=20, ignore_eos=True, stream=stream)
        while not self._stop.is_set():
            self.ends[self._ask(body, stream)] += 1

    def _ask(self, body: dict, stream: bool) -> str:
        """How one request ended; a hang raises TimeoutError, and another end fails the test."""
        try:
            answer = self._standing.post(CHAT, body, timeout_s=120)
        except TimeoutError:
            raise
        except (OSError, http.client.HTTPException):
            return "disconnected"
        if answer.status != 200:
            assert_error(answer, 503)
            return "refused"
        if stream and answer.frames[-1] != "[DONE]":
            assert_stream_error(answer)
            return "error in the stream"
        return "answered"

    def stop(self) -> None:
        self._stop.set()
        for client in self._clients:
            client.result(240)
        self._pool.shutdown()


@pytest.mark.slow
def test_row_74_kills_under_load_end_requests_and_hang_none(start_faulty_server, wait_for) -> None:
    server = start_faulty_server(
        supervision={"num_workers": 2, "has_standby": False, "max_restarts": 50},
        engine={"num_replicas": 2},
    )
    standing = Standing(server, is_warm=True)
    counts = {"worker": 2, "engine": 2, "decoder": 4}

    def is_whole() -> bool:
        return {kind: len(standing.pids(kind)) for kind in counts} == counts

    assert wait_for(is_whole)
    server.suffer("slow 0.01")
    load = Load(standing)
    try:
        for kind in ("engine", "worker", "engine", "worker"):
            done = load.ends.total()
            assert wait_for(lambda done=done: load.ends.total() > done + 2 * NUM_CLIENTS)
            victim = standing.pids(kind)[0]
            os.kill(victim, signal.SIGKILL)
            assert wait_for(lambda kind=kind, victim=victim: victim not in standing.pids(kind))
            assert wait_for(is_whole)
    finally:
        load.stop()
    assert load.ends["answered"] > 0
    assert load.ends.total() - load.ends["answered"] > 0, "no kill met a request"
    server.suffer("")
    assert wait_for(lambda: all(standing.get("/v1/health/ready").status == 200 for _ in range(8)))
    assert wait_for(lambda: not any(standing.snapshot().gauges.values()))
    assert standing.probe().status == 200
    assert "Traceback" not in server.log.read_text()
