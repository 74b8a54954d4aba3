"""SIGTERM to a worker with open requests: each ends by itself or by an error, none is cut."""

import asyncio
import contextlib
import json
import os
import signal
from pathlib import Path

import httpx2
import pytest
from support.engine_side import engine_at
from support.fake_runner import OrdinaryRunner
from support.http_to_engine import until_ready
from support.polling import until
from support.step_gate import StepGate
from support.worker_process import worker_process

from vlmserve.server.http.drain import Drain

DEADLINE_S = 120.0
# An open request outlasts the first, and the second lasts until it ends.
SHORT_DRAIN_S, LONG_DRAIN_S = 0.5, 100.0
NUM_FREE_STEPS = 20
NEW_REQUESTS = ["/v1/chat/completions"]


def body(**fields):
    turn = {"role": "user", "content": "Hello"}
    return {"model": "m", "messages": [turn], "ignore_eos": True, "max_tokens": 1000} | fields


@contextlib.asynccontextmanager
async def held_engine(path):
    """An engine that computes some tokens and no more until the gate is opened; and the gate."""
    gate = StepGate(NUM_FREE_STEPS)
    try:
        async with engine_at(path, OrdinaryRunner(before_step=gate)):
            yield gate
            gate.open()
    finally:
        gate.open()


def during_drain(tmp_path, use, *, drain_time_s=SHORT_DRAIN_S, during=None):
    """What `use(client)` gives if the worker is told to stop while it waits; and the exit code.

    during: awaited with the client and the engine's gate once the worker drains.
    """

    async def run():
        path = str(tmp_path / "engine.sock")
        async with (
            asyncio.timeout(DEADLINE_S),
            held_engine(path) as gate,
            worker_process(path, drain_time_s=drain_time_s) as worker,
            httpx2.AsyncClient(base_url=worker.url, timeout=DEADLINE_S) as client,
        ):
            await until_ready(client)
            using = asyncio.create_task(use(client))
            await until(lambda: gate.is_holding)
            worker.process.send_signal(signal.SIGTERM)
            if during is not None:
                await until_ready(client, 503)
                await during(client, gate)
            return await using, await worker.process.wait()

    return asyncio.run(run())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/inference/chat-completion"])
def test_a_stream_that_outlasts_the_drain_ends_with_an_error_frame(tmp_path, path):
    """It was cut in the middle, without an error or [DONE]."""
    stack = {
        "model_id": "m",
        "messages": [{"role": "user", "content": "Hello"}],
        "sampling_params": {"max_tokens": 1000, "strategy": {"type": "top_k", "top_k": 5}},
    }
    is_chat = path.endswith("completions")
    sent = (body() if is_chat else stack) | {"stream": True}
    answer, code = during_drain(tmp_path, lambda client: client.post(path, json=sent))
    assert code == 0
    frames = answer.text.strip().split("\n\n")
    if is_chat:
        assert frames.pop() == "data: [DONE]"
    last = json.loads(frames[-1].removeprefix("data: "))
    assert last["error"]["type"] == "service_unavailable_error"


def test_a_plain_answer_that_outlasts_the_drain_is_a_503(tmp_path):
    """Its connection was closed without an answer."""
    answer, code = during_drain(
        tmp_path, lambda client: client.post("/v1/chat/completions", json=body())
    )
    assert (answer.status_code, code) == (503, 0)
    assert answer.headers["retry-after"] == "1"


def test_a_short_answer_is_finished_in_the_drain(tmp_path):
    async def go_on(client, gate):
        gate.open()

    answer, code = during_drain(
        tmp_path,
        lambda client: client.post("/v1/chat/completions", json=body(max_tokens=40)),
        drain_time_s=LONG_DRAIN_S,
        during=go_on,
    )
    assert (answer.status_code, code) == (200, 0)
    assert answer.json()["usage"]["completion_tokens"] == 40


def test_new_requests_are_a_503_in_the_drain_on_new_connections_too(tmp_path):
    """They were refused by the kernel, which tells a client nothing of when to come back."""
    answers = []

    async def ask(client, gate):
        async with httpx2.AsyncClient(base_url=client.base_url, timeout=DEADLINE_S) as other:
            answers.extend([await other.post(path, json=body()) for path in NEW_REQUESTS])
            answers.append(await other.get("/v1/health/live"))
        gate.open()

    open_request, _ = during_drain(
        tmp_path,
        lambda client: client.post("/v1/chat/completions", json=body(max_tokens=40)),
        drain_time_s=LONG_DRAIN_S,
        during=ask,
    )
    assert open_request.status_code == 200
    *refused, live = answers
    assert live.status_code == 200
    for answer in refused:
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["object"] == "error"


def test_a_decoder_does_not_hold_the_listening_socket(tmp_path):
    async def run():
        path = str(tmp_path / "engine.sock")
        async with (
            asyncio.timeout(DEADLINE_S),
            held_engine(path),
            worker_process(path, drain_time_s=SHORT_DRAIN_S) as worker,
            httpx2.AsyncClient(base_url=worker.url) as client,
        ):
            await until_ready(client)
            listening = listening_socket(worker.url)
            return listening in links(worker.process.pid), [
                listening in links(pid) for pid in children_of(worker.process.pid)
            ]

    assert asyncio.run(run()) == (True, [False, False])


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def links(pid):
    folder = Path(f"/proc/{pid}/fd")
    return {os.readlink(fd) for fd in folder.iterdir()}


def listening_socket(url):
    """The link of a descriptor of the socket that listens on the URL's port."""
    port = f"{int(url.rsplit(':', 1)[1]):04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inode = next(one[9] for one in lines if one[1].endswith(f":{port}") and one[3] == "0A")
    return f"socket:[{inode}]"


def test_a_request_between_two_of_its_parts_is_waited_for():
    """It is open, and counted neither as being prepared nor as being answered."""
    looks = iter([1, 0, 1, 0, 0])
    ended = []

    async def end_requests():
        ended.append(True)

    async def run():
        stopped = asyncio.Event()
        drain = Drain(60.0, lambda: next(looks), end_requests, stopped.set)
        drain.start()
        await asyncio.wait_for(stopped.wait(), DEADLINE_S)

    asyncio.run(run())
    assert list(looks) == []
    assert ended == []
