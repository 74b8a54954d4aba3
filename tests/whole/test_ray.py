"""The server on Ray Serve, by `vlmserve serve --ray local`: the whole API at the ingress."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from support.client_checks import run_checks, variables_of
from support.client_environments import (
    CHECKS_TIMEOUT_S,
    RAY_PINS,
    ROOT,
    checks_command,
    ray_python,
)
from support.http_side import write_checkpoint
from support.polling import wait_until
from support.running import free_port, running_command
from support.tool_template import TOOL_TEMPLATE

from server_state import descendants

# Small, so that three engines fit beside other tests.
OPTIONS = ("--dtype", "float32", "--no-spare-engine", "--kv-cache-memory", "128MiB")
MODEL = "vlmserve-tiny-vision"
# Tests of the ordinary server that need its URL alone: each route, forms of answers, limits.
OF_THE_API = (
    "server/api/test_api_examples.py::test_an_example_answers_what_the_page_says",
    "server/api/test_json_text.py",
    "server/routes/test_hostile_requests.py::test_row_07_what_is_over_a_limit_is_refused_at_once",
    "server/routes/test_hostile_requests.py::test_row_08_a_grammar_too_deep_or_too_long_is_refused",
    "whole/test_choices_http.py",
    "whole/test_completions_http.py",
    "whole/test_documented_stack.py",
    "whole/test_end_to_end.py",
    "whole/test_invariants.py::test_every_generating_route_answers_its_body_and_refuses_nonsense",
    "whole/test_lifecycle.py::test_a_slow_answer_does_not_block_others",
    "whole/test_sampling_http.py",
    "whole/test_structured.py",
    "whole/test_tool_choice.py",
)
# Engines get their share of cores beside other tests, and Ray itself takes less of them.
CLUSTER_VARIABLES = {
    "RAY_worker_niceness": "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",
    "RAY_prestart_worker_first_driver": "0",
}
CLUSTER_CHECKS = ("configuration.py", "router.py", "affinity.py", "faults.py")
# Far off: on two cores shared with two other test processes they take 7 minutes.
CLUSTER_TIMEOUT_S, STOP_TIMEOUT_S = 1800, 300
# The line of pytest's summary about a failed test.
FAILED = re.compile(r"^(?:FAILED|ERROR) .*", re.MULTILINE)
HELLO = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
ENDLESS = HELLO | {"stream": True, "max_tokens": 8000, "ignore_eos": True}


@pytest.fixture(scope="module", params=sorted(path.stem for path in RAY_PINS.glob("*.txt")))
def server(request, tmp_path_factory):
    """Two engines on a cluster of one node, with each pinned version of Ray."""
    python, variables = ray_python(request.param)
    port = free_port()
    command = [python, "-m", "vlmserve.server", "serve", "--ray", "local", "--replicas", "2"]
    command += ["--port", port, *OPTIONS]
    folder = tmp_path_factory.mktemp("ray")
    with running_command(list(map(str, command)), port, folder, **variables) as running:
        yield running


def post(server, path, body, **headers):
    request = urllib.request.Request(
        server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"} | headers
    )
    return urllib.request.urlopen(request, timeout=120)


def running_requests(server):
    return server.metric("num_requests_running")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("client", "files"),
    [("openai", ("openai_sdk.py", "openai_echoes.py")), ("anthropic", ("anthropic_sdk.py",))],
)
def test_the_checks_of_clients_pass_at_the_ingress(client, files, server, draw_picture, tmp_path):
    command = checks_command(client, files)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", TOOL_TEMPLATE)
    names = {"SERVER_URL": server.url, "SERVER_MODEL": MODEL}
    names |= variables_of(draw_picture(1003, num_shapes=2), tmp_path)
    status, output = asyncio.run(run_checks(command, checkpoint, **names))
    assert status == 0, output


@pytest.mark.slow
def test_the_tests_of_the_ordinary_server_pass_at_the_ingress(server):
    tests = [ROOT / "tests" / name for name in OF_THE_API]
    options = ["-q", "-p", "no:cacheprovider", "-m", "not slow", "--server", server.url]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=CHECKS_TIMEOUT_S,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    # All of them: a test that no longer asks the shared server would be left out silently.
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 140


@pytest.mark.slow
def test_a_disconnect_cancels_the_request_in_the_engine(server):
    before = aborted(server)
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("POST", "/v1/chat/completions", json.dumps(ENDLESS))
    response = connection.getresponse()
    assert response.status == 200
    assert response.read(64).startswith(b"data: ")
    response.close()
    connection.close()
    assert wait_until(lambda: aborted(server) == before + 1)
    assert wait_until(lambda: running_requests(server) == 0)


def aborted(server):
    name = 'request_finish_total{finished_reason="abort"} '
    lines = server.get("/metrics").decode().splitlines()
    return next(float(line.removeprefix(name)) for line in lines if line.startswith(name))


@pytest.mark.slow
def test_answers_without_a_body_pass_the_ingress(server):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port)) as connection:
        for method, path, status in (
            ("HEAD", "/v1/models", 200),
            ("GET", "/v1/models?a=%20b", 200),
            ("DELETE", "/v1/models", 405),
            ("HEAD", "/v1/nothing", 404),
        ):
            connection.request(method, path)
            response = connection.getresponse()
            assert response.status == status, (method, path)
            assert bool(response.read()) == (method != "HEAD")
            assert int(response.headers["Content-Length"]) > 0


@pytest.mark.slow
def test_metrics_are_the_sums_over_the_replicas(server):
    before = server.metric("request_success_total")
    body = {"model": MODEL, "prompt": "Hi", "max_tokens": 1}
    replicas = [post(server, "/v1/completions", body).headers["X-Replica"]]
    # Idle replicas take turns; one whose health check was late on a busy machine does not.
    while len(set(replicas)) < 2 and len(replicas) < 100:
        replicas.append(post(server, "/v1/completions", body).headers["X-Replica"])
    assert len(set(replicas)) == 2
    assert server.metric("request_success_total") == before + len(replicas)
    assert server.metric("num_request_max") == 2 * 64


@pytest.mark.slow
def test_a_response_is_found_on_the_replica_that_keeps_it(server):
    body = {"model": MODEL, "input": "Hello", "max_output_tokens": 8}
    kept = json.load(post(server, "/v1/responses", body))
    for _ in range(3):
        got = json.loads(server.get(f"/v1/responses/{kept['id']}"))
        assert got["output"] == kept["output"]
        answer = post(server, "/v1/responses", body | {"previous_response_id": kept["id"]})
        assert json.load(answer)["previous_response_id"] == kept["id"]
    with pytest.raises(urllib.error.HTTPError, match="404") as unknown:
        server.get("/v1/responses/resp_unknown")
    unknown.value.close()


@pytest.mark.slow
def test_engines_run_at_the_priority_of_the_command(server):
    """Ray starts what it runs at nice 15: beside one busy process an engine got 3 % of a core."""
    engine = b"-m\0vlmserve.router.engine.process\0"
    processes = descendants(server.process.pid)
    engines = [pid for pid in processes if engine in Path(f"/proc/{pid}/cmdline").read_bytes()]
    own = os.getpriority(os.PRIO_PROCESS, server.process.pid)
    assert [os.getpriority(os.PRIO_PROCESS, pid) for pid in engines] == [own, own]


@pytest.mark.slow
def test_the_server_stops_on_a_signal(server):
    """The last of the tests with this server, which it ends."""
    server.process.terminate()
    assert server.process.wait(120) == 0, server.log.read_text()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], marks=pytest.mark.slow, id="short"),
        pytest.param(["--long"], marks=pytest.mark.torture, id="long"),
    ],
)
def test_the_checks_on_a_cluster_of_three_nodes_pass(options, tmp_path):
    """All files of `tests/on_ray/` in one process, and so with one cluster."""
    python, variables = ray_python("newest")
    folder = ROOT / "tests" / "on_ray"
    files = [folder / name for name in CLUSTER_CHECKS]
    command = [python, "-m", "pytest", "-s", "-c", folder / "pytest.ini", *options, *files]
    status, output = output_of(command, variables | CLUSTER_VARIABLES, tmp_path)
    if status != 0:
        # The first line is in pytest's summary; the end, the same, is what is seen of a long log.
        pytest.fail("\n".join([*FAILED.findall(output)[:1], output]))
    print(output)


def output_of(command, variables, folder):
    """The status of a command, and what it wrote: stderr, then stdout.

    Interrupted after CLUSTER_TIMEOUT_S, so that it reports where it hangs.
    """
    streams = folder / "stderr", folder / "stdout"
    with streams[0].open("w") as stderr, streams[1].open("w") as stdout:
        # Wide, so that the summary of its tests has whole messages.
        variables = os.environ | variables | {"COLUMNS": "200"}
        process = subprocess.Popen(command, env=variables, stdout=stdout, stderr=stderr)
        try:
            process.wait(CLUSTER_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
        finally:
            process.kill()
            process.wait()
    return process.returncode, "".join(path.read_text() for path in streams)
