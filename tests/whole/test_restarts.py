"""Children that die or hang: who is started again, when, and what clients are told.

The supervisor and the HTTP workers are the real ones; the engine hashes instead of computing
and fails on demand (`support/faulty_engine.py`).
"""

import contextlib
import os
import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from support.invariants import (
    CHAT,
    SLACK,
    STACK_ROUTES,
    TEXT_ROUTES,
    Standing,
    assert_error,
    assert_stream_error,
    body_for,
    num_descriptors,
)

from server_state import descendants, is_ready, is_running
from vlmserve.server.supervisor.ended_metrics import KINDS

QUICK = {"engine_timeouts": {"heartbeat_s": 1.5, "step_s": 1.5}, "has_standby": False}


def standing_of(server) -> Standing:
    """The standing assertions on an engine that takes no grammar and needs no warming."""
    return Standing(server, is_warm=True)


def long_body(route, **more):
    return body_for(route, max_tokens=3000, **more) | (
        {} if route in STACK_ROUTES else {"ignore_eos": True}
    )


class Open:
    """Long requests on every route, streamed and plain, each begun when this is made."""

    def __init__(self, standing, routes=TEXT_ROUTES):
        self._pool = ThreadPoolExecutor(2 * len(routes))
        self.answers = {
            (route, stream): self._pool.submit(
                standing.post, route, long_body(route, stream=stream)
            )
            for route in routes
            for stream in (True, False)
        }

    def assert_ended_by_an_error(self, within_s):
        """Begun streams end by an error frame, others by a 503, all in time."""
        num_started = 0
        deadline = time.monotonic() + within_s
        for (_, stream), answer in self.answers.items():
            result = answer.result(max(0.0, deadline - time.monotonic()))
            if stream and result.status == 200:
                error = assert_stream_error(result)
                assert error["type"] == "service_unavailable_error"
                num_started += 1
            else:
                assert_error(result, 503)
                assert int(result.headers["retry-after"]) >= 1
        assert num_started
        self._pool.shutdown()


def log_of(server) -> str:
    return server.log.read_text()


def until_running(standing, wait_for, count):
    assert wait_for(lambda: standing.metrics()["num_requests_running"] == count)


def test_row_33_engine_killed_ends_streams_and_others_within_1_s_and_serves_again(
    start_faulty_server, wait_for
):
    server = start_faulty_server(engine={"max_num_seqs": 8})
    standing = standing_of(server)
    server.suffer("slow 0.02")
    with standing.holds(same_engine=False):
        # More than the engine runs at once: some are still queued.
        requests = Open(standing)
        until_running(standing, wait_for, 8)
        num_waiting = len(requests.answers) - 8
        assert wait_for(lambda: standing.metrics()["num_requests_waiting"] == num_waiting)
        assert wait_for(lambda: standing.metrics()["generation_tokens_total"] > 100)
        os.kill(standing.engine_pid, signal.SIGKILL)
        requests.assert_ended_by_an_error(1.0 * SLACK)
        assert wait_for(lambda: standing.get("/v1/health/ready").status == 200, 5.0 * SLACK)
    assert "the engine ended (signal SIGKILL); starting another now" in log_of(server)
    assert restarts(standing) == {"engine": (1, 0), "worker": (0, 0)}


def test_row_33_requests_between_two_engines_are_a_503(start_faulty_server, wait_for):
    server = start_faulty_server(supervision={"has_standby": False, "max_restarts": 20})
    standing = standing_of(server)
    # Those that die while they load are tried again after pauses.
    server.suffer("dies loading")
    os.kill(standing.engine_pid, signal.SIGKILL)
    assert wait_for(lambda: "starting another in 2 s" in log_of(server))
    assert standing.get("/v1/health/ready").status == 503
    for route in TEXT_ROUTES:
        for stream in (True, False):
            assert_error(standing.post(route, body_for(route, stream=stream)), 503)
    assert standing.get("/v1/health/live").status == 200
    server.suffer("")
    assert wait_for(lambda: standing.get("/v1/health/ready").status == 200)


def hang_by_stopping(server, standing):
    os.kill(standing.engine_pid, signal.SIGSTOP)


def hang_in_a_step(server, standing):
    server.suffer("hang")


@pytest.mark.parametrize(
    "hang", [hang_in_a_step, pytest.param(hang_by_stopping, marks=pytest.mark.slow)]
)
def test_row_34_a_hung_engine_is_not_ready_and_then_restarted(start_faulty_server, wait_for, hang):
    server = start_faulty_server(supervision=QUICK, server={"ready_stall_s": 0.5})
    standing = standing_of(server)
    # A step of each kind, so that none counts as compiling.
    standing.probe()
    server.suffer("slow 0.02")
    with standing.holds(same_engine=False):
        before = standing.engine_pid
        requests = Open(standing)
        assert wait_for(lambda: standing.metrics()["generation_tokens_total"] > 20)
        hang(server, standing)
        assert wait_for(lambda: standing.get("/v1/health/ready").status == 503, 5.0 * SLACK)
        assert standing.get("/v1/health/live").status == 200
        requests.assert_ended_by_an_error(15.0 * SLACK)
        server.suffer("")
        assert wait_for(lambda: standing.get("/v1/health/ready").status == 200, 15.0 * SLACK)
        assert standing.engine_pid != before
    assert "killing it" in log_of(server)
    assert restarts(standing) == {"engine": (0, 1), "worker": (0, 0)}


def test_row_35_a_killed_worker_is_replaced_and_its_requests_leave_the_engine(
    start_faulty_server, wait_for
):
    server = start_faulty_server(engine={"max_num_seqs": 2})
    standing = standing_of(server)
    server.suffer("slow 0.02")
    with standing.holds():
        with ThreadPoolExecutor(len(TEXT_ROUTES)) as pool:
            lost = [pool.submit(standing.post, one, long_body(one)) for one in TEXT_ROUTES]
            until_running(standing, wait_for, 2)
            (worker,) = standing.pids("worker")
            decoders = standing.pids("decoder")
            os.kill(worker, signal.SIGKILL)
            # The kernel keeps the connection until another worker takes it.
            assert standing.get("/v1/health/live", 3.0 * SLACK).status == 200
            assert all(isinstance(one.exception(30), ConnectionError) for one in lost)
        assert standing.pids("worker") != [worker]
        assert wait_for(lambda: not any(map(is_running, decoders)))


@pytest.mark.slow
def test_row_35_a_hung_worker_is_ended_and_replaced_and_its_requests_leave_the_engine(
    start_faulty_server, wait_for
):
    """It kept its connections and its share of new ones for good, and nobody noticed."""
    # Longer than a busy machine keeps a process from running.
    stall_s = 4.0
    server = start_faulty_server(
        supervision={"num_workers": 2, "worker_timeouts": {"stall_s": stall_s}},
        engine={"max_num_seqs": 8},
    )
    standing = standing_of(server)
    until_whole(standing, wait_for, num_workers=2)
    server.suffer("slow 0.02")
    with standing.holds():
        with ThreadPoolExecutor(8) as pool:
            body = body_for(CHAT, max_tokens=300, ignore_eos=True)
            calls = [pool.submit(standing.post, CHAT, body) for _ in range(8)]
            until_running(standing, wait_for, 8)
            # The one that holds most of the connections.
            other, hung = sorted(standing.pids("worker"), key=num_descriptors)
            os.kill(hung, signal.SIGSTOP)
            assert wait_for(lambda: hung not in standing.pids("worker"), (stall_s + 3.0) * SLACK)
            ends = [one.exception(60 * SLACK) for one in calls]
            assert any(isinstance(one, OSError) for one in ends)
            kept = [call for call, end in zip(calls, ends, strict=True) if end is None]
            assert all(one.result().status == 200 for one in kept)
        until_whole(standing, wait_for, num_workers=2)
        assert other in standing.pids("worker")
    assert "an HTTP worker has not run its event loop for" in log_of(server)
    assert restarts(standing) == {"engine": (0, 0), "worker": (0, 1)}


def num_connected_workers(standing):
    """The connections of workers to the only engine: without its listener and the supervisor's."""
    engines = standing.pids("engine")
    if len(engines) != 1:
        return 0
    paths = [one.laddr for one in psutil.Process(engines[0]).net_connections("unix")]
    return sum(path.endswith(".sock") for path in paths) - 2


def until_whole(standing, wait_for, num_workers):
    """Every worker is there with its decoders and its connection to a ready engine."""
    whole = [num_workers, 2 * num_workers]
    assert wait_for(lambda: [len(standing.pids(kind)) for kind in ("worker", "decoder")] == whole)
    assert wait_for(lambda: num_connected_workers(standing) == num_workers)
    ready = "/v1/health/ready"
    assert wait_for(lambda: all(standing.get(ready).status == 200 for _ in range(12)))


def restarts(standing):
    """How often /metrics says that engines and workers ended, and hung."""
    told = standing.metrics()
    return {
        process: tuple(
            told[f'vlmserve_restarts_total{{process="{process}",reason="{reason}"}}']
            for reason in ("ended", "hung")
        )
        for process in ("engine", "worker")
    }


def test_row_35_a_killed_supervisor_leaves_nothing_running(start_faulty_server, wait_for):
    server = start_faulty_server(supervision={"num_workers": 2, "standby_delay_s": 0.0})
    standing = standing_of(server)
    assert wait_for(lambda: standing.pids("spare"))
    until_whole(standing, wait_for, num_workers=2)
    family = descendants(server.process.pid)
    assert len(family) == 8, "expected an engine, a spare, two workers and their four decoders"
    server.process.kill()
    server.process.wait(30)
    assert wait_for(lambda: not any(map(is_running, family)))


@pytest.mark.slow
def test_row_35_two_workers_are_each_replaced(start_faulty_server, wait_for):
    server = start_faulty_server(supervision={"num_workers": 2})
    standing = standing_of(server)
    until_whole(standing, wait_for, num_workers=2)
    with standing.holds():
        for old in standing.pids("worker"):
            os.kill(old, signal.SIGKILL)
            assert wait_for(lambda old=old: len(set(standing.pids("worker")) - {old}) == 2)
        until_whole(standing, wait_for, num_workers=2)
    assert restarts(standing) == {"engine": (0, 0), "worker": (2, 0)}


@pytest.mark.slow
def test_figures_are_those_of_all_workers_and_outlive_them(start_faulty_server, wait_for):
    """Whichever worker answers /metrics tells the sum; a killed one's counts do not vanish."""
    server = start_faulty_server(supervision={"num_workers": 2})
    standing = standing_of(server)
    until_whole(standing, wait_for, num_workers=2)

    def ask(count):
        num_steps = standing.metrics()["vlmserve_steps_total"]
        with ThreadPoolExecutor(8) as pool:
            bodies = [body_for(CHAT, max_tokens=3, ignore_eos=True)] * count
            for answer in pool.map(lambda body: standing.post(CHAT, body), bodies):
                assert answer.status == 200
        # What the engine tells of itself comes with its heartbeats, to all workers at once.
        assert wait_for(lambda: has_rested(num_steps))

    def has_rested(num_steps):
        told = standing.metrics()
        return told["vlmserve_steps_total"] > num_steps and told["num_requests_running"] == 0

    def assert_told(count):
        for _ in range(6):
            told = standing.metrics()
            assert told["request_success_total"] == count
            assert told["generation_tokens_total"] == 3 * count
            assert told["e2e_request_latency_seconds_count"] == count
            assert told["num_requests_running"] == 0

    with standing.holds():
        ask(20)
        assert_told(20)
        for old in standing.pids("worker"):
            os.kill(old, signal.SIGKILL)
            assert wait_for(lambda old=old: len(set(standing.pids("worker")) - {old}) == 2)
        until_whole(standing, wait_for, num_workers=2)
        assert_told(20)
        ask(10)
        assert_told(30)


def test_row_53_live_and_ready_say_what_the_engine_does(start_faulty_server, wait_for):
    """Ready goes when the heartbeat is 2 s old or a step stands still, and comes back with it."""
    server = start_faulty_server(server={"heartbeat_timeout_s": 0.9, "ready_stall_s": 0.9})
    standing = standing_of(server)
    with standing.holds():
        os.kill(standing.engine_pid, signal.SIGSTOP)
        assert wait_for(lambda: standing.get("/v1/health/ready").status == 503)
        assert_not_ready(standing.get("/v1/health/ready"))
        assert standing.get("/v1/health/live").status == 200
        os.kill(standing.engine_pid, signal.SIGCONT)
        assert wait_for(lambda: standing.get("/v1/health/ready").status == 200)
        server.suffer("slow 2.5")
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(standing.post, CHAT, body_for(CHAT, max_tokens=4))
            assert wait_for(lambda: standing.get("/v1/health/ready").status == 503)
            assert standing.get("/v1/health/live").status == 200
            server.suffer("")
            assert answer.result().status == 200
        assert wait_for(lambda: standing.get("/v1/health/ready").status == 200)


def assert_not_ready(answer):
    message = {"object": "health.response", "message": "Service is not ready."}
    assert (answer.status, answer.json) == (503, message)


@pytest.mark.slow
def test_an_engine_that_dies_again_and_again_ends_the_server_with_one_line(start_faulty_server):
    server = start_faulty_server(supervision={"max_restarts": 2, "has_standby": False})
    server.suffer("dies loading")
    family = descendants(server.process.pid)
    os.kill(standing_of(server).engine_pid, signal.SIGKILL)
    assert server.process.wait(60) == 1
    log = log_of(server)
    assert "starting another now" in log
    assert "starting another in 0.5 s" in log
    assert "the engine ended 3 times in 300 s, last by exit code 7: giving up" in log
    assert not any(map(is_running, family))


@contextlib.contextmanager
def without_descriptors(pid):
    """The process can open nothing, and so start no child, within the context."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("role", ["worker", pytest.param("engine", marks=pytest.mark.slow)])
def test_row_60_a_child_that_the_system_cannot_start_is_started_later(
    start_faulty_server, wait_for, role
):
    """Before: the supervisor ended with a traceback, and with it the server."""
    server = start_faulty_server(supervision={"has_standby": False, "max_restarts": 50})
    standing = standing_of(server)
    with without_descriptors(server.process.pid):
        os.kill(standing.pids(role)[0], signal.SIGKILL)
        assert wait_for(lambda: "the system cannot start it: Too many open files" in log_of(server))
        assert server.process.poll() is None
    assert wait_for(lambda: standing.pids(role))
    assert wait_for(lambda: is_ready(server.url))
    assert standing.post(CHAT, body_for(CHAT, max_tokens=3)).status == 200
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0


@pytest.mark.slow
def test_row_60_a_worker_that_can_never_be_started_ends_the_server_without_a_traceback(
    start_faulty_server, wait_for
):
    server = start_faulty_server(supervision={"has_standby": False, "max_restarts": 1})
    family = descendants(server.process.pid)
    with without_descriptors(server.process.pid):
        os.kill(standing_of(server).pids("worker")[0], signal.SIGKILL)
        assert server.process.wait(60) == 1
    log = log_of(server)
    assert "an HTTP worker ended 2 times in 300 s, the system cannot start it: Too many" in log
    assert "Traceback" not in log
    assert wait_for(lambda: not any(map(is_running, family)))


@pytest.mark.slow
def test_files_of_metrics_do_not_pile_up(start_faulty_server, wait_for):
    server = start_faulty_server()
    standing = standing_of(server)
    folder = Path(psutil.Process(standing.pids("worker")[0]).environ()["PROMETHEUS_MULTIPROC_DIR"])
    for _ in range(3):
        old = standing.pids("worker")
        os.kill(old[0], signal.SIGKILL)
        assert wait_for(lambda old=old: standing.pids("worker") not in ([], old))
        until_whole(standing, wait_for, num_workers=1)
    names = {file.name for file in folder.glob("*.db")}
    (pid,) = standing.pids("worker")
    assert names == {f"{kind}_{owner}.db" for kind in KINDS for owner in ("ended", pid)}


def test_a_spare_takes_the_dead_engines_place(start_faulty_server, wait_for):
    server = start_faulty_server(supervision={"standby_delay_s": 0.0})
    standing = standing_of(server)
    assert wait_for(lambda: standing.pids("spare"))
    (spare,) = standing.pids("spare")
    with standing.holds(same_engine=False):
        os.kill(standing.engine_pid, signal.SIGKILL)
        assert wait_for(lambda: standing.pids("engine") == [spare])
        assert wait_for(lambda: standing.get("/v1/health/ready").status == 200)
    assert wait_for(lambda: standing.pids("spare"))
    # One that dies in waiting is not missed: an engine is started as if there was none.
    os.kill(standing.pids("spare")[0], signal.SIGKILL)
    os.kill(standing.engine_pid, signal.SIGKILL)
    assert wait_for(lambda: standing.pids("engine"))
    assert wait_for(lambda: standing.get("/v1/health/ready").status == 200)
