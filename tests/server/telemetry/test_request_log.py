"""What the log tells: one line a request, nothing private, nothing that a client could forge."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import signal
import ssl
import subprocess
import sys
import urllib.parse
from pathlib import Path

import httpx2
import pytest
from support.http_side import (
    MODEL,
    OneTileImages,
    ScriptedEngine,
    client_of,
    meta_like_tokenizer,
    tokens_one_by_one,
)
from support.invariants import CHAT, GENERATION_ROUTES, PICTURE, body_for
from support.polling import until, wait_until
from support.running import MODEL_NAME, serving

from server_state import descendants, is_running
from vlmserve.router.errors import EngineInternalError, QueueFullError
from vlmserve.router.messages import SequenceOutput
from vlmserve.router.processes.logs import EventFormatter, StrayLines, escaped, request_id_of_task
from vlmserve.server.admission.lanes import LANE_NAMES
from vlmserve.server.images.settings import ImageError
from vlmserve.server.prompts.rendering import META_REASONS
from vlmserve.server.telemetry.usual_fields import USUAL_FOREIGN_FIELDS

TOKENIZER = meta_like_tokenizer()
CERTIFICATE = Path(__file__).resolve().parents[2] / "data" / "tls_test_only.pem"
DEADLINE_S = 120.0
OWN_NAME = "my-model"
# Controls, an escape sequence, a bidirectional override, and what a log shipper splits at.
HOSTILE = "a\x1b[31mb\r\nc\x85d\u2028e\u202ef\x00g"


class Lines:
    """All that was logged, as the JSON lines of a server."""

    def __init__(self, stream):
        self._stream = stream

    @property
    def text(self):
        return self._stream.getvalue()

    @property
    def all(self):
        events = [json.loads(line) for line in self.text.splitlines()]
        # The test's own client logs here too.
        return [event for event in events if event["logger"] != "httpx2"]

    @property
    def requests(self):
        return [line for line in self.all if line["logger"] == "vlmserve.access"]


@pytest.fixture
def lines():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(EventFormatter("json", "worker"))
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield Lines(stream)
    root.removeHandler(handler)
    root.setLevel(level)


def served(checkpoint, use, *, script=None, images=None, **settings):
    async def run():
        script_or_text = script or (lambda request: list(tokens_one_by_one(TOKENIZER, "What?")))
        engine = ScriptedEngine(script_or_text)
        async with client_of(checkpoint, engine, images=images, **settings) as client:
            return await use(client, engine)

    return asyncio.run(run())


def body_of(path, *more, **fields):
    body = body_for(path, *more, **fields)
    return body | {name: MODEL for name in ("model", "model_id") if name in body}


# One line a request


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", GENERATION_ROUTES)
def test_a_generation_is_one_line_with_its_figures(checkpoint, lines, path, stream):
    async def use(client, engine):
        body = body_of(path, images=[PICTURE], stream=stream)
        return await client.post(path, json=body, headers={"X-Request-Id": "mine"})

    assert served(checkpoint, use).status_code == 200
    (line,) = lines.requests
    assert line["request_id"] == "mine"
    assert (line["method"], line["route"], line["status"]) == ("POST", path, 200)
    assert (line["images"], line["completion_tokens"]) == (1, 3)
    assert line["prompt_tokens"] > 0
    assert line["finish_reasons"] == ["stop"]
    assert 0 <= line["queue_s"] <= line["total_s"]
    assert 0 <= line["ttft_s"] <= line["total_s"]


def test_queue_time_is_the_engines_own(checkpoint, lines):
    def script(request):
        yield SequenceOutput(request_id="r", token_ids=[3923], queue_s=1.25)
        yield SequenceOutput(request_id="r", token_ids=[128009], finish_reason="stop")

    async def use(client, engine):
        return await client.post(CHAT, json=body_of(CHAT))

    served(checkpoint, use, script=script)
    assert lines.requests[0]["queue_s"] == 1.25


def test_every_answer_of_a_request_tells_its_reason(checkpoint, lines):
    def script(request):
        yield SequenceOutput(request_id="0", token_ids=[3923, 128009], finish_reason="stop")
        yield SequenceOutput(request_id="1", token_ids=[3923, 374], finish_reason="length")

    async def use(client, engine):
        return await client.post(CHAT, json=body_of(CHAT, n=2))

    assert served(checkpoint, use, script=script).status_code == 200
    (line,) = lines.requests
    assert sorted(line["finish_reasons"]) == ["length", "stop"]
    assert line["completion_tokens"] == 4


@pytest.mark.parametrize(
    ("method", "path", "status", "route"),
    [
        ("GET", "/v1/models", 200, "/v1/models"),
        ("HEAD", "/v1/models", 200, "/v1/models"),
        ("GET", "/metrics", 200, "/metrics"),
        ("GET", "/nothing/secret-path", 404, "unmatched"),
        ("GET", CHAT, 405, "unmatched"),
        ("POST", CHAT, 400, CHAT),
    ],
)
def test_other_requests_are_one_line_each(checkpoint, lines, method, path, status, route):
    async def use(client, engine):
        return await client.request(method, path)

    assert served(checkpoint, use).status_code == status
    (line,) = lines.requests
    assert (line["method"], line["route"], line["status"]) == (method, route, status)
    assert len(line["request_id"]) == 32
    assert "prompt_tokens" not in line


@pytest.mark.parametrize("path", ["/health", "/v1/health/live", "/v1/health/ready"])
def test_a_health_check_is_logged_only_if_it_fails(checkpoint, lines, path):
    async def use(client, engine):
        passed = await client.get(path)
        failed = await client.post(path)
        return passed.status_code, failed.status_code

    assert served(checkpoint, use) == (200, 405)
    assert [line["status"] for line in lines.requests] == [405]


def test_a_refused_key_is_a_line_with_the_route_it_was_for(checkpoint, lines):
    async def use(client, engine):
        await client.post(CHAT, json=body_of(CHAT))

    served(checkpoint, use, api_keys=["k"])
    assert [(line["route"], line["status"]) for line in lines.requests] == [(CHAT, 401)]


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (b"GET /v1/models HTTP/1.1\r\nHost: a\r\nX-A: \x00\r\n\r\n", 400),
        (b"GET /v1/models HTTP/1.1\r\nHost: a\r\nX-A: " + b"a" * 20_000 + b"\r\n\r\n", 431),
        (b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{", 408),
        (b"GET /v1/models HTTP/1.1\r\nHost: a\r\n", 408),
    ],
)
def test_a_head_or_body_that_is_none_is_one_line_too(checkpoint, lines, raw, status):
    async def use(client, engine):
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        writer.write(raw)
        answer = await reader.read()
        writer.close()
        return answer

    answer = served(checkpoint, use, request_timeout_s=0.2)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert [line["status"] for line in lines.requests] == [status]


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [(QueueFullError("full", 3.0), 429, "error"), (EngineInternalError("no"), 500, "error")],
)
def test_what_the_engine_refuses_is_one_line(checkpoint, lines, error, status, reason):
    async def use(client, engine):
        return await client.post(CHAT, json=body_of(CHAT))

    assert served(checkpoint, use, script=lambda request: [error]).status_code == status
    (line,) = lines.requests
    assert (line["status"], line["finish_reasons"]) == (status, [reason])


def test_a_request_that_is_not_wanted_in_the_log_is_counted_all_the_same(checkpoint, lines):
    async def use(client, engine):
        await client.get("/v1/models")
        return (await client.get("/metrics")).text

    text = served(checkpoint, use, log_requests=False)
    assert lines.requests == []
    counted = 'vlmserve_http_requests_total{method="GET",route="/v1/models",status="200"} 1.0'
    assert counted in text


class NeverLoads(OneTileImages):
    """Images that never come, and say when they are waited for."""

    def __init__(self):
        super().__init__()
        self.asked = asyncio.Event()

    async def load(self, images, deadline=None):
        self.asked.set()
        await asyncio.Event().wait()


@pytest.mark.parametrize("path", [CHAT, "/inference/chat_completion"])
@pytest.mark.parametrize("stage", ["images", "plain answer", "before the stream", "stream"])
def test_a_client_that_goes_away_is_a_499(checkpoint, lines, stage, path):
    def script(request):
        if stage == "stream":
            yield SequenceOutput(request_id="r", token_ids=[3923])
        yield 600.0

    images = NeverLoads() if stage == "images" else OneTileImages()

    async def use(client, engine):
        pictures = [PICTURE] if stage == "images" else []
        is_stream = stage not in ("images", "plain answer")
        body = json.dumps(body_of(path, images=pictures, stream=is_stream)).encode()
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        head = f"POST {path} HTTP/1.1\r\nHost: a\r\nX-Request-Id: gone\r\n"
        writer.write(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        if stage == "images":
            await images.asked.wait()
        elif stage == "stream":
            await reader.readuntil(b"data: ")
        else:
            await until(lambda: engine.requests)
        writer.close()
        await until(lambda: lines.requests)

    settings = {"first_output_wait_s": 0.2 if stage == "stream" else 20.0}
    served(checkpoint, use, script=script, images=images, **settings)
    (line,) = lines.requests
    assert (line["status"], line["request_id"]) == (499, "gone")
    assert line.get("finish_reasons", ["abort"]) in (["abort"], [])


def test_half_a_head_of_a_client_that_goes_away_is_no_fault(checkpoint, lines):
    """Nothing was asked for: no line at all, and above all no error."""

    async def use(client, engine):
        _, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: a\r\n")
        await writer.drain()
        await client.get("/v1/health/live")  # by then the server has read it
        writer.close()
        await writer.wait_closed()
        await client.get("/v1/health/live")

    served(checkpoint, use)
    others = [line for line in lines.all if line.get("route") != "/v1/health/live"]
    assert [line for line in others if line["level"] in ("warning", "error")] == []
    assert {line["status"] for line in others} <= {499}


def test_a_telling_that_fails_costs_no_connection(checkpoint, lines, monkeypatch):
    def fail(*_):
        raise RuntimeError("SECRET")

    monkeypatch.setattr("vlmserve.server.telemetry.request_log.fields_of", fail)

    async def use(client, engine):
        return [(await client.get("/v1/models")).status_code for _ in range(2)]

    assert served(checkpoint, use) == [200, 200]
    assert {line["message"] for line in lines.all} == {"cannot log a request that has ended"}
    assert "SECRET" not in lines.text


def test_a_kept_connection_logs_each_of_its_requests_under_its_own_id(checkpoint, lines):
    async def use(client, engine):
        for number in range(3):
            await client.get("/v1/models", headers={"X-Request-Id": f"id-{number}"})

    served(checkpoint, use)
    assert [line["request_id"] for line in lines.requests] == ["id-0", "id-1", "id-2"]
    assert request_id_of_task.get() is None


# Row 46


class SecretError(RuntimeError):
    """What nobody expected, with a client's words in it."""


def test_row_46_an_unexpected_exception_tells_its_place_and_none_of_its_words(checkpoint, lines):
    class Leaky(OneTileImages):
        async def load(self, images, deadline=None):
            raise SecretError(f"cannot load {images[0].url} at 0x7f1234567890")

    async def use(client, engine):
        body = body_of(CHAT, images=["https://h.example/a.png?token=SECRET"])
        return await client.post(CHAT, json=body, headers={"X-Request-Id": "boom"})

    answer = served(checkpoint, use, images=Leaky())
    assert answer.status_code == 500
    for hidden in ("SECRET", "0x7f", "h.example", str(Path(__file__).parent)):
        assert hidden not in answer.text
        assert hidden not in lines.text
    (told,) = [line for line in lines.all if "exception" in line]
    assert told["request_id"] == "boom"
    assert told["exception"]["type"] == "SecretError"
    assert " load" in told["exception"]["at"][0]


def test_row_46_a_talkative_library_is_told_by_its_place(lines):
    logging.getLogger("sanic.error").error("GET http://h/?token=SECRET from 10.1.2.3")
    logging.getLogger("asyncio").error("Task <SECRET at 0x7f12> was never retrieved")
    assert [line["message"].split(" in ")[0] for line in lines.all] == ["error", "error"]
    assert "SECRET" not in lines.text


SECRETS = {
    "prompt": "prompt-SECRET-1",
    "query": "query-SECRET-2",
    "key": "key-SECRET-3",
    "path": "path-SECRET-4",
    "host": "host-secret-5.example",
    "wrong_key": "wrong-SECRET-6",
    "cookie": "cookie-SECRET-7",
    "user": "user-SECRET-8",
    "salt": "salt-SECRET-9",
    "model": "model-SECRET-10",
    "field": "field_SECRET_11",
    "image": "SECRETIMAGE12",
    "agent": "agent-SECRET-13",
    "method": "SECRETMETHOD14",
    "forwarded": "192.0.2.77",
}


def secret_calls(path):
    """Requests that plant every secret there is a place for, good and bad ones."""
    private = f"http://127.0.0.2:9/{SECRETS['path']}?q={SECRETS['query']}"
    broken = f"data:image/png;base64,{SECRETS['image']}AAAA"
    body = body_for(path, SECRETS["prompt"])
    yield "POST", path, body
    yield "POST", path, body | {"stream": True}
    yield "POST", path, body_for(path, SECRETS["prompt"], images=[PICTURE])
    yield "POST", path, body_for(path, SECRETS["prompt"], images=[private])
    yield "POST", path, body_for(path, SECRETS["prompt"], images=[broken])
    yield "POST", path, body | {SECRETS["field"]: SECRETS["prompt"]}
    yield "POST", path, body | {"user": SECRETS["user"], "cache_salt": SECRETS["salt"]}
    named = {name: SECRETS["model"] for name in ("model", "model_id") if name in body}
    yield "POST", path, body | named
    yield "POST", path, body | {"messages": SECRETS["prompt"]}
    yield "POST", f"{path}?q={SECRETS['query']}", body


@pytest.fixture(scope="module")
def secret_run(tmp_path_factory):
    """One server's whole log, and its figures, after planted secrets on every route; with the
    answers to a good key before and after a SIGHUP, over TLS."""
    folder = tmp_path_factory.mktemp("secrets")
    keys = folder / "keys"
    keys.write_text(f"# one\n{SECRETS['key']}\n")
    options = [
        *("--dtype", "float32", "--log-format", "json", "--api-key-file", str(keys)),
        *("--tls-certfile", str(CERTIFICATE), "--max-model-len", "512"),
        *("--served-model-name", f"{OWN_NAME},{MODEL_NAME}"),
    ]
    with serving(folder, *options) as server:
        result = {"headers": [], "server": server}
        tls = ssl._create_unverified_context()
        with httpx2.Client(base_url=server.url, verify=tls, timeout=60) as client:
            good = {"Authorization": f"Bearer {SECRETS['key']}"}
            private = {
                "Cookie": f"a={SECRETS['cookie']}",
                "User-Agent": SECRETS["agent"],
                "X-Forwarded-For": SECRETS["forwarded"],
                "Referer": f"https://{SECRETS['host']}/",
            }
            calls = [call for path in GENERATION_ROUTES for call in secret_calls(path)]
            calls += [("GET", f"/{SECRETS['path']}?{SECRETS['query']}", None)]
            calls += [(SECRETS["method"], "/v1/models", None)]
            for method, path, body in calls:
                answer = client.request(method, path, json=body, headers=good | private)
                result["headers"].append((answer.status_code, answer.headers["x-request-id"]))
            wrong = {"Authorization": f"Bearer {SECRETS['wrong_key']}"}
            result["refused"] = client.get("/v1/models", headers=wrong).status_code
            result["metrics"] = client.get("/metrics", headers=good).text
            keys.write_text("after-hangup\n")
            server.process.send_signal(signal.SIGHUP)
            after = {"Authorization": "Bearer after-hangup"}
            assert wait_until(
                lambda: client.get("/v1/models", headers=after).status_code == 200, DEADLINE_S
            )
            result["models"] = client.get("/v1/models", headers=after).json()["data"]
            result["old key"] = client.get("/v1/models", headers=good).status_code
        result["calls"] = calls
        result["family"] = descendants(server.process.pid)
    # At the end of the block came a SIGTERM.
    result["exit code"] = server.process.returncode
    result["log"] = server.log.read_text()
    return result


def test_row_46_no_secret_of_a_run_is_in_its_log(secret_run):
    statuses = {status for status, _ in secret_run["headers"]}
    assert {200, 400, 404} <= statuses
    assert not {status for status in statuses if status >= 500}
    # An operator reads there which fields clients send in vain.
    assert f"ignored the unknown field {SECRETS['field']!r}" in secret_run["log"]
    for name, secret in SECRETS.items():
        if name == "field":
            continue
        for form in (secret, urllib.parse.quote(secret), secret.lower()):
            assert form not in secret_run["log"], name
    assert "127.0.0.2" not in secret_run["log"]
    assert "Traceback" not in secret_run["log"]


def test_row_46_nor_in_its_metrics(secret_run):
    for name, secret in SECRETS.items():
        assert secret.lower() not in secret_run["metrics"].lower(), name


def test_row_48_no_label_takes_its_value_from_a_client(secret_run):
    from prometheus_client.parser import text_string_to_metric_families

    labels = {}
    for family in text_string_to_metric_families(secret_run["metrics"]):
        for sample in family.samples:
            for name, value in sample.labels.items():
                labels.setdefault(name, set()).add(value)
    fixed = {"le", "finished_reason", "process", "reason", "lane", "field"}
    assert set(labels) == fixed | {"method", "route", "status"}
    assert labels["process"] == {"engine", "worker"}
    assert labels["lane"] == {name.replace(" ", "_") for name in LANE_NAMES}
    assert labels["field"] <= {"other", *USUAL_FOREIGN_FIELDS}
    assert labels["reason"] == {"ended", "hung", *META_REASONS}
    assert labels["finished_reason"] == {"stop", "length", "tool_calls", "abort", "error"}
    assert labels["method"] <= {"GET", "HEAD", "POST", "other"}
    assert labels["route"] <= {*GENERATION_ROUTES, "/v1/health/ready", "/v1/models", "unmatched"}
    assert all(value.isdigit() for value in labels["status"])


def test_every_line_of_the_run_is_an_event_and_each_request_has_one(secret_run):
    events = [json.loads(line) for line in secret_run["log"].splitlines()]
    assert {"time", "level", "process", "message"} <= set.intersection(*map(set, events))
    assert {"supervisor", "worker", "engine"} == {event["process"] for event in events}
    told = [event["request_id"] for event in events if event.get("logger") == "vlmserve.access"]
    sent = [request_id for _, request_id in secret_run["headers"]]
    assert [told.count(request_id) for request_id in sent] == [1] * len(sent)


def test_sigterm_ended_the_whole_tree_of_the_run_with_exit_code_0(secret_run):
    assert len(secret_run["family"]) >= 4, "expected an engine, a worker and two decoders"
    assert secret_run["exit code"] == 0
    assert wait_until(lambda: not any(is_running(pid) for pid in secret_run["family"]), DEADLINE_S)


def test_the_ready_line_names_the_url_and_the_first_name_of_the_model(secret_run):
    events = [json.loads(line)["message"] for line in secret_run["log"].splitlines()]
    (line,) = [one for one in events if "vlmserve is ready on" in one]
    assert secret_run["server"].url in line
    assert OWN_NAME in line
    assert [model["id"] for model in secret_run["models"]] == [OWN_NAME, MODEL_NAME]


def test_the_run_was_over_tls_and_says_so(secret_run):
    assert secret_run["server"].scheme == "https"
    assert f"vlmserve is ready on {secret_run['server'].url} " in secret_run["log"]


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_process_logs_from_its_level_on_and_no_words_of_what_ends_it(form):
    code = (
        "import logging, sys, threading\n"
        "from vlmserve.router.processes.logs import say, set_up_logging\n"
        f"set_up_logging('warning', {form!r}, 'engine')\n"
        "logging.getLogger('vlmserve.x').info('an info')\n"
        "logging.getLogger('vlmserve.x').warning('a warning')\n"
        "say('ready')\n"
        "def fail(): raise ValueError('SECRET of a thread')\n"
        "one = threading.Thread(target=fail); one.start(); one.join()\n"
        "raise ValueError('SECRET of the process')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "SECRET" not in done.stderr
    assert "an info" not in done.stderr
    told = done.stderr.splitlines()
    assert len(told) == 4
    wanted = ["a warning", "ready", "a thread ends", "the process ends"]
    assert all(words in line for words, line in zip(wanted, told, strict=True))
    if form == "json":
        assert json.loads(told[3])["exception"]["type"] == "ValueError"


def test_what_is_written_beside_a_json_log_becomes_an_event(lines):
    stray = StrayLines()
    stray.write("loading ")
    stray.write("weights\n\nand more")
    stray.write("\n")
    assert [line["message"] for line in lines.all] == ["loading weights", "and more"]


def test_a_hangup_takes_the_new_keys_and_drops_the_old(secret_run):
    assert secret_run["refused"] == 401
    assert secret_run["old key"] == 401


# Row 47


def test_row_47_controls_are_escaped_in_both_forms_of_the_log():
    for form in ("json", "text"):
        record = logging.LogRecord("x", logging.INFO, "", 0, "model %s", (HOSTILE,), None)
        record.fields = {"route": HOSTILE, "reasons": [HOSTILE]}
        line = EventFormatter(form, "worker").format(record)
        assert line.isprintable()
        assert len(line.splitlines()) == 1
        assert line.count("\\x1b") >= 2
    assert escaped("\ud800").isprintable()


@pytest.mark.parametrize(
    "sent", [b"a\x1b[31m", b"a b", b"a" * 129, b"\xc3\xa9", b"", b"a\tb", b"<x>"]
)
@pytest.mark.parametrize("path", ["/v1/models", *GENERATION_ROUTES])
def test_row_47_a_bad_request_id_is_replaced(checkpoint, lines, path, sent):
    async def use(client, engine):
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        body = json.dumps(body_of(path)).encode() if path in GENERATION_ROUTES else b""
        method = b"POST " if body else b"GET "
        writer.write(
            method + path.encode() + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX-Request-Id: "
            + sent + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )  # fmt: skip
        answer = await reader.read()
        writer.close()
        return answer

    head = served(checkpoint, use).split(b"\r\n\r\n")[0].lower()
    (header,) = [line for line in head.split(b"\r\n") if line.startswith(b"x-request-id: ")]
    (line,) = lines.requests
    assert header.removeprefix(b"x-request-id: ").decode() == line["request_id"]
    assert len(line["request_id"]) == 32
    assert lines.text.replace("\n", "").isprintable()


def test_row_47_a_hostile_model_forges_no_line(checkpoint, lines):
    async def use(client, engine):
        for path in GENERATION_ROUTES:
            hostile = HOSTILE.replace("\0", "")  # that one is refused before the model is looked at
            named = {name: hostile for name in ("model", "model_id") if name in body_for(path)}
            answer = await client.post(path, json=body_for(path) | named)
            assert answer.status_code == 404

    served(checkpoint, use)
    assert len(lines.all) == len(GENERATION_ROUTES)


def test_an_image_error_is_told_to_the_client_and_not_to_the_log(checkpoint, lines):
    class Refusing(OneTileImages):
        async def load(self, images, deadline=None):
            raise ImageError("image is too wide", 0)

    async def use(client, engine):
        return await client.post(CHAT, json=body_of(CHAT, images=[PICTURE]))

    assert "too wide" in served(checkpoint, use, images=Refusing()).text
    (line,) = lines.all
    assert (line["status"], line["images"]) == (400, 1)
