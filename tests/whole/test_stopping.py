"""SIGTERM, a second SIGTERM, and starts that cannot be: what an operator sees, and how soon."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from support.faulty_server import ENGINE
from support.forked_command import run_forked
from support.invariants import (
    CHAT,
    SLACK,
    TEXT_ROUTES,
    Standing,
    assert_error,
    assert_stream_error,
    body_for,
    kind_of,
)
from support.polling import wait_until
from support.running import free_port

from server_state import descendants, is_running
from vlmserve.models.bundled import CHECKPOINT
from vlmserve.router.config import EngineConfig

VLMSERVE = [sys.executable, "-m", "vlmserve.server", "serve"]
# From the signal, or the start, to the end; a start imports what the command line needs.
EXIT_S = 2.0


def running_stream(pool, standing, wait_for, max_tokens=3000):
    body = body_for(CHAT, max_tokens=max_tokens, stream=True, ignore_eos=True)
    answer = pool.submit(standing.post, CHAT, body)
    assert wait_for(lambda: standing.metrics()["generation_tokens_total"] > 5)
    return answer


def test_row_51_sigterm_refuses_what_is_new_and_ends_what_outlasts_the_drain(
    start_faulty_server, wait_for
):
    """On every route: a short answer, a long one, and a long stream are open when it comes."""
    server = start_faulty_server(
        supervision={"drain_time_s": 4.0}, engine={"heartbeat_interval_s": 0.05}
    )
    standing = Standing(server, is_warm=True)
    # Nothing ends before all have begun.
    server.suffer("slow 0.5")
    family = descendants(server.process.pid)
    bodies = [
        (route, body_for(route, **fields))
        for fields in (
            {"max_tokens": 20},
            {"max_tokens": 3000},
            {"max_tokens": 3000, "stream": True},
        )
        for route in TEXT_ROUTES
    ]
    with ThreadPoolExecutor(len(bodies)) as pool:
        calls = [pool.submit(standing.post, *one) for one in bodies]
        begun = "time_to_first_token_seconds_count"
        assert wait_for(lambda: standing.metrics()[begun] == len(bodies))
        server.process.send_signal(signal.SIGTERM)
        assert wait_for(lambda: standing.get("/v1/health/ready").status == 503, 1.0 * SLACK)
        server.suffer("slow 0.02")
        for route in TEXT_ROUTES:
            for streamed in (False, True):
                refused = standing.post(route, body_for(route, stream=streamed))
                assert_error(refused, 503)
                assert int(refused.headers["retry-after"]) >= 1
        assert standing.get("/v1/health/live").status == 200
        num_routes = len(TEXT_ROUTES)
        assert not any(call.done() for call in calls[num_routes:])
        ends = [call.result() for call in calls]
    assert [one.status for one in ends[:num_routes]] == [200] * num_routes
    for plain in ends[num_routes : 2 * num_routes]:
        assert_error(plain, 503)
    for stream in ends[2 * num_routes :]:
        assert assert_stream_error(stream)["type"] == "service_unavailable_error"
    assert server.process.wait(EXIT_S * SLACK) == 0
    assert not any(map(is_running, family))


def test_row_52_a_second_sigterm_ends_everything_at_once(start_faulty_server, wait_for):
    server = start_faulty_server(supervision={"drain_time_s": 60.0})
    standing = Standing(server, is_warm=True)
    server.suffer("slow 0.02")
    family = descendants(server.process.pid)
    with ThreadPoolExecutor(1) as pool:
        stream = running_stream(pool, standing, wait_for)
        server.process.send_signal(signal.SIGTERM)
        assert wait_for(lambda: standing.get("/v1/health/ready").status == 503)
        assert not stream.done()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(EXIT_S * SLACK) == 1
        assert stream.exception(EXIT_S * SLACK) is not None, "the stream was cut"
    assert not any(map(is_running, family))
    lines = [line for line in server.log.read_text().splitlines() if line.startswith("vlmserve:")]
    (line,) = [line for line in lines if "stopping" in line]
    assert "a second signal stops them now" in line


def test_row_52_a_signal_while_the_engine_loads_ends_everything(tmp_path):
    port, log = free_port(), tmp_path / "log"
    with log.open("wb") as err:
        process = subprocess.Popen([*VLMSERVE, "--port", str(port)], stderr=err)
    try:
        assert wait_until(lambda: "engine" in map(kind_of, descendants(process.pid)))
        family = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(EXIT_S * SLACK) == 0
        assert not any(map(is_running, family))
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()


def started(*options):
    return subprocess.run([*VLMSERVE, *options], capture_output=True, text=True, timeout=60)


def forked(*options):
    return run_forked(["serve", *options])


def failed_start(*options, run=started) -> str:
    """The one line of a start that fails, in time and with nothing left running."""
    began = time.monotonic()
    done = run(*options)
    assert time.monotonic() - began < EXIT_S * SLACK
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("vlmserve: ")
    return line


def test_row_52_a_port_in_use_is_one_line_at_once():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "Address already in use; choose another --port" in failed_start("--port", str(port))


def checkpoint_with(tmp_path, damage):
    folder = tmp_path / "model"
    shutil.copytree(CHECKPOINT, folder)
    (weights,) = folder.glob("*.safetensors")
    damage(folder, weights)
    return folder


DAMAGE = {
    "no weights": lambda folder, weights: weights.unlink(),
    "cut weights": lambda folder, weights: os.truncate(weights, weights.stat().st_size - 100),
    "no header": lambda folder, weights: weights.write_bytes(b"\xff" * 64),
    "no JSON": lambda folder, weights: (folder / "config.json").write_text("{"),
    "another model": lambda folder, weights: (folder / "config.json").write_text(
        '{"model_type": "llama"}'
    ),
    "wrong types": lambda folder, weights: (folder / "config.json").write_text(
        '{"model_type": "mllama", "text_config": {"hidden_size": "x"}, "vision_config": {}}'
    ),
    "cut tokenizer": lambda folder, weights: os.truncate(folder / "tokenizer.json", 1000),
    "a tokenizer of a gibibyte": lambda folder, weights: os.truncate(
        folder / "tokenizer.json", 1 << 30
    ),
    "a link out of it": lambda folder, weights: (
        weights.rename(folder.parent / "w"),
        weights.symlink_to(folder.parent / "w"),
    ),
    "no tokenizer": lambda folder, weights: (folder / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_row_52_an_unreadable_model_is_one_line_at_once(tmp_path, damage):
    """The engine imported torch first, and its line was followed by others."""
    folder = checkpoint_with(tmp_path, DAMAGE[damage])
    # One of them as users start it: that its imports are few is all that the others would add.
    run = started if damage == "cut weights" else forked
    line = failed_start(str(folder), "--port", "0", run=run)
    assert "Traceback" not in line


def engine_of(path) -> subprocess.Popen:
    """An engine process that was told to listen at `path`."""
    process = subprocess.Popen(
        [sys.executable, ENGINE], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    config = EngineConfig(model="fake", socket_path=str(path))
    process.stdin.write(msgspec.json.encode(config) + b"\n")
    process.stdin.flush()
    return process


def test_row_52_a_stale_socket_is_replaced_and_a_live_one_is_one_line(tmp_path, wait_for):
    path = tmp_path / "engine.sock"
    first = engine_of(path)
    assert wait_for(path.exists)
    first.kill()
    first.communicate()
    assert path.exists(), "the socket that a killed engine leaves behind"
    second = engine_of(path)
    try:
        assert wait_for(lambda: can_connect(path))
        third = engine_of(path)
        _, errors = third.communicate(timeout=EXIT_S * SLACK)
        assert third.returncode == 2
        (line,) = errors.decode().strip().splitlines()
        assert "another engine listens" in line
        assert can_connect(path)
    finally:
        second.kill()
        second.communicate()


def can_connect(path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def test_an_engine_that_cannot_load_at_the_start_ends_the_server_at_once(tmp_path):
    """One line of the engine's; nothing is restarted."""
    fault = tmp_path / "fault"
    fault.write_text("unloadable")
    server = ENGINE.replace("faulty_engine", "faulty_server")
    done = subprocess.run(
        [sys.executable, server, json.dumps({"port": free_port()})],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"FAULT_FILE": str(fault)},
    )
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "cannot load the model" in line]
    assert len(lines) == 1
    assert "starting another" not in done.stderr
