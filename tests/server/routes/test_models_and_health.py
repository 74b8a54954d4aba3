"""Models, health, metrics, keys and what is refused by a request's head."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import msgspec
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.http_side import (
    CLIENT_DEADLINE_S,
    MODEL,
    ScriptedEngine,
    client_of,
    meta_like_tokenizer,
    tokens_one_by_one,
)
from support.polling import wait_until
from support.shapes import shape_of

from vlmserve.server.settings import ServerSettings

DATA = Path(__file__).resolve().parents[2] / "data"
TOKENIZER = meta_like_tokenizer()
CHAT = "/v1/chat/completions"
EXCHANGE_S = 120.0
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "What?"}]}
ROUTES = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/a/b"),
    ("GET", "/server_info"),
    ("POST", "/tokenize"),
    ("POST", "/v1/detokenize"),
    ("GET", "/metrics"),
    ("GET", "/v1/metrics"),
    ("GET", "/nothing"),
    ("POST", "/v1/models"),
    ("POST", CHAT),
    *(
        ("POST", prefix + path)
        for prefix in ("", "/ls", "/experimental/ls")
        for path in (
            "/inference/chat_completion",
            "/alpha/inference/chat-completion",
            "/v1/inference/chat-completion",
        )
    ),
]


def serve(checkpoint, use, *, engine=None, **settings):
    """Run `use(client, engine)` against a server and give what it gives."""

    async def run():
        script = lambda request: list(tokens_one_by_one(TOKENIZER, "What?"))  # noqa: E731
        fake = engine or ScriptedEngine(script)
        async with client_of(checkpoint, fake, **settings) as client:
            return await use(client, fake)

    return asyncio.run(run())


def get(checkpoint, path, *, method="GET", headers=None, **options):
    async def use(client, engine):
        return await client.request(method, path, headers=headers)

    return serve(checkpoint, use, **options)


def exchange(checkpoint, raw, **options):
    """Send bytes as they are; gives all that comes back until the server closes."""

    async def use(client, engine):
        url = client.base_url
        reader, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(raw)
        async with asyncio.timeout(EXCHANGE_S):
            answer = await reader.read()
        writer.close()
        return answer

    return serve(checkpoint, use, **options)


def test_models_has_the_documented_shape(checkpoint):
    sample = json.loads((DATA / "models.response.json").read_text())
    answer = get(checkpoint, "/v1/models").json()
    assert shape_of(answer) == shape_of(sample)
    card, expected = answer["data"][0], sample["data"][0]
    changing = {"created", "permission"}
    assert {k: v for k, v in card.items() if k not in changing} == {
        k: v for k, v in expected.items() if k not in changing
    }
    permission, documented = card["permission"][0], expected["permission"][0]
    assert len(permission["id"]) == len(documented["id"])
    assert {k: v for k, v in permission.items() if k not in ("id", "created")} == {
        k: v for k, v in documented.items() if k not in ("id", "created")
    }


def test_models_is_the_same_twice_and_lists_every_served_name(checkpoint):
    async def use(client, engine):
        return [(await client.get("/v1/models")).json() for _ in range(2)]

    one, two = serve(checkpoint, use, served_model_names=["a", "b"])
    assert one == two
    assert [(card["id"], card["root"]) for card in one["data"]] == [("a", "a"), ("b", "a")]


def test_max_model_len_is_the_engines_and_before_that_the_checkpoints(checkpoint):
    engine = ScriptedEngine(lambda request: [], max_model_len=512)

    async def use(client, engine):
        before = (await client.get("/v1/models")).json()["data"][0]["max_model_len"]
        engine.info = None
        after = (await client.get("/v1/models")).json()["data"][0]["max_model_len"]
        return before, after

    assert serve(checkpoint, use, engine=engine) == (512, 131072)


def test_health_answers_as_documented(checkpoint):
    for name in ("ready", "live"):
        response = get(checkpoint, f"/v1/health/{name}")
        assert response.status_code == 200
        assert list(response.json().items()) == list(
            json.loads((DATA / f"{name}.response.json").read_text()).items()
        )


def test_not_ready_is_a_503_and_live_stays_200(checkpoint):
    """An engine of which no heartbeat had come yet was ready whatever became of it."""

    async def use(client, engine):
        answers = []
        for is_ready, age_s, stall_s, may_compile in (
            (False, 0.1, 0.0, False),
            (True, 30.0, 0.0, False),
            (True, float("inf"), 0.0, False),
            (True, 0.1, 30.0, False),
            (True, 0.1, 30.0, True),
        ):
            engine.is_ready, engine.heartbeat_age_s = is_ready, age_s
            engine.stall_s, engine.may_compile = stall_s, may_compile
            answers.append(await client.get("/v1/health/ready"))
        return answers, await client.get("/v1/health/live")

    (*not_ready, compiling), live = serve(checkpoint, use)
    for response in not_ready:
        assert response.status_code == 503
        assert response.text == '{"object":"health.response","message":"Service is not ready."}'
    assert (compiling.status_code, live.status_code) == (200, 200)


def test_unknown_routes_and_methods_are_json_errors(checkpoint):
    missing = get(checkpoint, "/nothing")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "invalid_request_error")
    wrong = get(checkpoint, CHAT)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["object"] == "error"


def test_a_path_with_a_parameter_names_all_its_methods(checkpoint):
    async def use(client, engine):
        return await client.put("/v1/responses/resp_1")

    answer = serve(checkpoint, use)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD, DELETE")


def test_metrics_count_requests_under_the_documented_names(checkpoint):
    async def use(client, engine):
        await client.post(CHAT, json=BODY)
        return (await client.get("/metrics")).text, (await client.get("/v1/metrics")).text

    text, other = serve(checkpoint, use)
    values = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("finished_reason", "stop") == "stop"
    }
    assert values["generation_tokens_total"] == 3
    assert values["request_success_total"] == values["request_finish_total"] == 1
    assert values["time_to_first_token_seconds_count"] == 1
    assert values["e2e_request_latency_seconds_count"] == 1
    assert values["request_prompt_tokens_count"] == 1
    assert values["prompt_tokens_total"] == values["request_prompt_tokens_sum"] > 0
    assert values["gpu_cache_usage_perc"] == 0.25
    assert values["num_requests_running"] == 1
    assert values["num_request_max"] == 64
    assert {"num_requests_waiting", "request_failure_total"} <= set(values)
    assert set(map(str, text_string_to_metric_families(other)))


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        "Basic key",
        "key",
        "Bearer k\xe9y",
        "bearer KEY",
    ],
)
def test_every_route_but_live_and_ready_needs_the_key(checkpoint, authorization):
    async def use(client, engine):
        headers = (
            [] if authorization is None else [(b"authorization", authorization.encode("latin-1"))]
        )
        answers = [await client.request(*route, headers=headers) for route in ROUTES]
        health = [
            await client.get(f"/v1/health/{name}", headers=headers) for name in ("live", "ready")
        ]
        return answers, health

    answers, health = serve(checkpoint, use, api_keys=["key", "other"])
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.content for answer in answers}) == 1
    assert answers[0].json()["error"]["code"] == "invalid_api_key"
    assert answers[0].headers["www-authenticate"] == "Bearer"
    assert {answer.status_code for answer in health} == {200}


def test_any_of_the_keys_opens_the_routes(checkpoint):
    for key in ("key", "schlüssel"):
        headers = [(b"Authorization", f"Bearer {key}".encode())]
        response = get(checkpoint, "/v1/models", headers=headers, api_keys=["key", "schlüssel"])
        assert response.status_code == 200


@pytest.mark.parametrize("path", ["/v1/health/live/", "/V1/health/live", "//v1/health/live"])
def test_a_path_that_only_looks_open_needs_the_key(checkpoint, path):
    response = get(checkpoint, path, api_keys=["key"])
    assert response.status_code in (200, 401)
    if response.status_code == 200:
        assert response.json()["message"] == "Service is live."


@pytest.mark.parametrize(
    "line",
    [
        b"GARBAGE",
        b"GET  /v1/models HTTP/1.1",
        b"GET /v1/models HTTP/3.0",
        b"GET /v1/models?\x1b[31m HTTP/1.1",
        b"GET /caf\xc3\xa9 HTTP/1.1",
        b"GET /%ff HTTP/1.1",
        b"FOO /v1/models HTTP/1.1",
        b"OPTIONS * HTTP/1.1",
        b"GET //[ HTTP/1.1",
        b"GET /" + b"a" * 9000 + b" HTTP/1.1",
    ],
)
def test_a_strange_request_line_gets_a_json_error(checkpoint, line, caplog):
    answer = exchange(checkpoint, line + b"\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert answer[:10] == b"HTTP/1.1 4"
    assert b'"object":"error"' in answer
    assert len(answer) < 2000
    assert "\x1b" not in caplog.text


def test_a_harmless_request_id_is_echoed_and_another_replaced(checkpoint):
    async def use(client, engine):
        ids = []
        for given in (b"abc-1.2:3_4", b"a b", b"a" * 129, b"\xc3\xa9"):
            response = await client.get("/v1/models", headers=[(b"X-Request-Id", given)])
            ids.append(response.headers["x-request-id"])
        return ids

    kept, *replaced = serve(checkpoint, use)
    assert kept == "abc-1.2:3_4"
    assert all(len(request_id) == 32 for request_id in replaced)


def test_settings_travel_as_json():
    settings = ServerSettings(model="m", engine_socket="s", served_model_names=["a"], listen_fd=3)
    assert msgspec.json.decode(msgspec.json.encode(settings), type=ServerSettings) == settings


@contextlib.contextmanager
def worker_process(checkpoint, tmp_path, **settings):
    """A worker as the supervisor starts it; gives the process and its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        options = ServerSettings(
            model=str(checkpoint),
            engine_socket=str(tmp_path / "engine.sock"),
            served_model_names=[MODEL],
            listen_fd=listening.fileno(),
            **settings,
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "vlmserve.server.worker.process"],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[listening.fileno()],
        )
        try:
            process.stdin.write(msgspec.json.encode(options))
            process.stdin.close()
            yield process, f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            process.kill()
            process.wait()
            process.stderr.close()


def loaded_libraries(pid):
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {Path(line.split()[-1]).name for line in lines if "/" in line}


def test_a_worker_serves_an_inherited_socket_and_knows_no_torch(checkpoint, tmp_path):
    with worker_process(checkpoint, tmp_path) as (process, url):
        with httpx2.Client(base_url=url, timeout=CLIENT_DEADLINE_S) as client:
            assert client.get("/v1/health/live").json()["message"] == "Service is live."
            assert client.get("/v1/health/ready").status_code == 503
            assert client.post(CHAT, json=BODY).status_code == 503
            assert client.get("/v1/models").json()["data"][0]["id"] == MODEL
        assert not {name for name in loaded_libraries(process.pid) if "torch" in name}
        process.send_signal(signal.SIGTERM)
        assert process.wait(CLIENT_DEADLINE_S) == 0


def test_importing_the_worker_loads_no_torch_no_transformers_and_no_numpy():
    code = (
        "import sys, vlmserve.server.worker.process; "
        "heavy = {'torch', 'transformers', 'sanic_ext', 'numpy', 'llguidance'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_worker_ends_with_its_parent(checkpoint, tmp_path):
    code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'vlmserve.server.worker.process'],"
        " stdin=subprocess.PIPE, pass_fds=[int(sys.argv[1])])\n"
        "child.stdin.write(sys.argv[2].encode()); child.stdin.close()\n"
        "print(child.pid, flush=True); sys.stdin.read()\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as listening:
        options = ServerSettings(
            model=str(checkpoint),
            engine_socket=str(tmp_path / "engine.sock"),
            served_model_names=[MODEL],
            listen_fd=listening.fileno(),
        )
        arguments = [str(listening.fileno()), msgspec.json.encode(options).decode()]
        parent = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[listening.fileno()],
        )
        with parent:
            worker = int(parent.stdout.readline())
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1/health/live"
            assert httpx2.get(url, timeout=CLIENT_DEADLINE_S).status_code == 200
            parent.kill()
    assert wait_until(lambda: not is_running(worker)), "the worker outlived its parent"


def is_running(pid):
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.parametrize("stdin", [b"", b"{}", b'{"model": "/nowhere", "x": 1}'])
def test_a_worker_without_good_settings_says_so_in_one_line(stdin):
    done = subprocess.run(
        [sys.executable, "-m", "vlmserve.server.worker.process"], input=stdin, capture_output=True
    )
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert done.stderr.startswith(b"HTTP worker cannot start: ")


@pytest.mark.parametrize("sent", [MODEL, MODEL.replace("/", "%2F"), "b%20c"])
def test_one_model_is_found_by_each_of_its_names(checkpoint, sent):
    async def use(client, engine):
        cards = (await client.get("/v1/models")).json()["data"]
        return cards, (await client.get(f"/v1/models/{sent}")).json()

    cards, card = serve(checkpoint, use, served_model_names=[MODEL, "b c"])
    assert card == cards[sent == "b%20c"]


@pytest.mark.parametrize("sent", ["gpt", "meta", f"{MODEL}/x", "%00", "%ff%0d%0a"])
def test_a_model_that_is_not_served_is_a_404(checkpoint, sent):
    response = get(checkpoint, f"/v1/models/{sent}")
    assert response.status_code == 404
    error = response.json()
    assert (error["code"], error["param"]) == (404, "model")
    assert error["error"]["code"] == "model_not_found"


def test_the_sdk_retrieves_a_model_whose_name_has_a_slash(checkpoint):
    async def use(client, engine):
        async with openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="none") as sdk:
            card = await sdk.models.retrieve(MODEL)
            with pytest.raises(openai.NotFoundError) as missing:
                await sdk.models.retrieve("a/b")
        return card, missing.value

    card, missing = serve(checkpoint, use)
    assert (card.id, card.object) == (MODEL, "model")
    assert (missing.code, missing.param) == ("model_not_found", "model")


def test_the_short_health_route_says_whether_requests_are_taken(checkpoint):
    async def use(client, engine):
        before = await client.get("/health")
        engine.is_ready = False
        return before, await client.get("/health"), await client.head("/health")

    before, after, head = serve(checkpoint, use)
    assert (before.status_code, after.status_code, head.status_code) == (200, 503, 503)
    assert before.json() == {"object": "health.response", "message": "Service is ready."}
    assert after.json() == {"object": "health.response", "message": "Service is not ready."}
