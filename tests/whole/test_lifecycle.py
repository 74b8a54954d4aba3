"""Starting, ending and dying: what an operator and the clients see."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest
from support.forked_command import run_forked
from support.invariants import Standing

from server_state import descendants, is_running

VLMSERVE = [sys.executable, "-m", "vlmserve.server"]
MODEL = "vlmserve-tiny-vision"
NAME = "my-model"
OPTIONS = [
    "--host",
    "--port",
    "--max-model-len",
    "--max-num-seqs",
    "--max-num-batched-tokens",
    "--device",
    "--dtype",
    "--served-model-name",
    "--api-key",
]


@pytest.fixture(scope="module")
def hashing(start_shared_faulty_server):
    """A server whose engine hashes; its tests but the last leave it ready."""
    return start_shared_faulty_server()


def engine_pid(server) -> int:
    return Standing(server).engine_pid


def open_stream(server, model=MODEL):
    """A stream that goes on for long: the end of the turn does not stop it."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Who are you?"}],
        "temperature": 0,
        "max_tokens": 8000,
        "ignore_eos": True,
        "stream": True,
    }
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    return urllib.request.urlopen(request, timeout=60)


def assert_the_signal_ends_the_tree(server, wait_for, signum):
    family = descendants(server.process.pid)
    assert len(family) >= 4, "expected an engine, a worker and two decoders"
    server.process.send_signal(signum)
    assert server.process.wait(60) == 0
    assert wait_for(lambda: not any(is_running(pid) for pid in family))


def test_sigint_ends_the_whole_tree_with_exit_code_0(start_faulty_server, wait_for):
    assert_the_signal_ends_the_tree(start_faulty_server(), wait_for, signal.SIGINT)


@pytest.mark.slow
def test_an_engine_that_dies_ends_open_requests_with_an_error_and_another_takes_over(
    start_server, wait_for
):
    """The whole server ended with it."""
    named = start_server("--served-model-name", NAME)
    streams = [open_stream(named, NAME) for _ in range(3)]
    for stream in streams:
        stream.readline()
    os.kill(engine_pid(named), signal.SIGKILL)
    for stream in streams:
        frames = [line for line in stream.read().decode().split("\n") if line.startswith("data: ")]
        assert frames[-1] == "data: [DONE]"
        error = json.loads(frames[-2].removeprefix("data: "))["error"]
        assert error["message"]
        assert error["type"]
    assert wait_for(lambda: "the engine ended (signal SIGKILL)" in named.log.read_text())
    assert wait_for(lambda: status_of(named, "/v1/health/ready") == 200, 180)
    with open_stream(named, NAME) as stream:
        assert stream.readline().startswith(b"data: ")


def test_a_port_in_use_is_one_clear_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [*VLMSERVE, "serve", "--port", port], capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        f"vlmserve: cannot listen on 127.0.0.1:{port}: Address already in use; "
        "choose another --port"
    ]


def test_steps_too_small_for_the_running_requests_are_one_clear_line():
    """A decode left out of every step would wait until another request ends."""
    few = ["--max-num-batched-tokens", "7", "--max-num-seqs", "8", "--port", "0"]
    done = run_forked(["serve", *few])
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("vlmserve: --max-num-batched-tokens is 7, --max-num-seqs is 8")


@pytest.mark.parametrize("model", ["/nonexistent/model", "./nothing-here", "no-such-model"])
def test_a_model_that_is_not_there_is_one_clear_line(model):
    done = run_forked(["serve", model, "--port", "0"])
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"vlmserve: no model at {model!r}")


def test_pickle_weights_are_refused_before_they_are_read(tmp_path):
    from vlmserve.models.bundled import CHECKPOINT

    for file in CHECKPOINT.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"not to be read")
    done = run_forked(["serve", str(tmp_path), "--port", "0"])
    assert done.returncode == 1
    assert "safetensors" in done.stderr
    assert "Traceback" not in done.stderr


def test_ready_is_503_while_the_engine_stands_still(hashing, wait_for):
    assert wait_for(lambda: status_of(hashing, "/v1/health/ready") == 200)
    body = json.loads(hashing.get("/v1/health/ready"))
    assert body == {"object": "health.response", "message": "Service is ready."}
    stopped = engine_pid(hashing)
    os.kill(stopped, signal.SIGSTOP)
    try:
        assert wait_for(lambda: status_of(hashing, "/v1/health/ready") == 503)
        assert status_of(hashing, "/v1/health/live") == 200
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert wait_for(lambda: status_of(hashing, "/v1/health/ready") == 200)


def status_of(server, path: str) -> int:
    try:
        with urllib.request.urlopen(server.url + path, timeout=30) as response:
            return response.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_help_groups_and_explains_every_option():
    done = subprocess.run(
        [*VLMSERVE, "serve", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "120", "NO_COLOR": "1"},
    )
    assert done.returncode == 0
    for heading in ("Model", "Engine", "HTTP"):
        assert f"\n{heading}:\n" in done.stdout
    for option in OPTIONS:
        assert option in done.stdout


def test_a_slow_answer_does_not_block_others(server):
    """A long stream and a short question at once: the short one ends first."""
    order = []

    def long() -> None:
        with open_stream(server) as stream:
            for _ in range(200):
                stream.readline()
            order.append("long")

    thread = threading.Thread(target=long)
    thread.start()
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=60).read()
    order.append("short")
    thread.join(60)
    assert order == ["short", "long"]


def test_sigterm_ends_the_whole_tree_with_exit_code_0(hashing, wait_for):
    """The last test: it ends the server of the others."""
    assert_the_signal_ends_the_tree(hashing, wait_for, signal.SIGTERM)
