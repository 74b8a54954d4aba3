"""Traces: one of each request, with its stages, at the parent that the client named."""

from __future__ import annotations

import asyncio
import http.server
import threading
from collections import defaultdict

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support.http_side import (
    MODEL,
    ScriptedEngine,
    client_of,
    meta_like_tokenizer,
    tokens_one_by_one,
)
from support.invariants import GENERATION_ROUTES, PICTURE, body_for
from support.polling import FAR_S

from vlmserve.server.cli import startup_checks as start_checks
from vlmserve.server.cli.startup_checks import trace_settings
from vlmserve.server.settings import TraceSettings
from vlmserve.server.telemetry import tracing
from vlmserve.server.telemetry.request_record import RequestRecord
from vlmserve.server.telemetry.tracing import Tracer

TOKENIZER = meta_like_tokenizer()
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"


@pytest.fixture
def collector(monkeypatch):
    """An OTLP/HTTP collector of the test's own: its URL and the bodies it got, with paths."""
    monkeypatch.setattr(tracing, "CLOSE_TIMEOUT_S", FAR_S)
    got = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((self.path, body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", got
    server.shutdown()
    thread.join()
    server.server_close()


def spans_of(got):
    """All spans of what a collector got, with the name of their service."""
    found = []
    for path, body in got:
        assert path == "/v1/traces"
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            attributes = {one.key: one.value.string_value for one in resource.resource.attributes}
            for scope in resource.scope_spans:
                found += [(attributes["service.name"], span) for span in scope.spans]
    return found


def a_record(**fields):
    record = RequestRecord(method="POST", route="/v1/chat/completions", status=200)
    began = record.started
    record.images_started, record.images_ended = began + 0.1, began + 0.3
    record.admitted, record.queue_s = began + 0.4, 0.5
    record.first_token, record.last_token, record.ended = began + 1.0, began + 2.0, began + 2.1
    record.prompt_tokens, record.completion_tokens = 7, 9
    record.finish_reasons = ["stop"]
    for name, value in fields.items():
        setattr(record, name, value)
    return record


def exported(*records, settings=None):
    exporter = InMemorySpanExporter()

    async def run():
        tracer = Tracer(settings or TraceSettings(), exporter)
        for record in records:
            tracer.add(record)
        await tracer.close()

    asyncio.run(run())
    return exporter.get_finished_spans()


def test_a_request_is_a_span_with_its_stages_below(monkeypatch):
    record = a_record()
    spans = {span.name: span for span in exported(record)}
    root = spans.pop("POST /v1/chat/completions")
    assert root.parent is None
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["gen_ai.usage.input_tokens"] == 7
    assert root.attributes["gen_ai.usage.output_tokens"] == 9
    assert root.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert root.attributes["vlmserve.request_id"] == record.request_id
    assert root.end_time - root.start_time == pytest.approx(2.1e9, rel=1e-3)
    seconds = {name: (span.end_time - span.start_time) / 1e9 for name, span in spans.items()}
    expected = {"images": 0.2, "queue": 0.5, "prefill": 0.1, "decode": 1.0}
    assert seconds == {name: pytest.approx(one, abs=1e-3) for name, one in expected.items()}
    assert all(span.parent.span_id == root.context.span_id for span in spans.values())
    assert all(root.start_time <= span.start_time for span in spans.values())


def test_a_request_that_failed_early_has_the_stages_it_came_to():
    record = a_record(admitted=None, first_token=None, last_token=None, status=500)
    spans = {span.name: span for span in exported(record)}
    assert set(spans) == {"POST /v1/chat/completions", "images"}
    assert not spans["POST /v1/chat/completions"].status.is_ok


@pytest.mark.parametrize("header", [None, "", "nonsense", PARENT.replace("00-", "ff-"), PARENT])
def test_a_sound_traceparent_is_taken_over_and_another_passed_over(header):
    (root,) = [s for s in exported(a_record(traceparent=header)) if s.kind.name == "SERVER"]
    if header == PARENT:
        assert f"{root.context.trace_id:032x}" == TRACE_ID
        assert f"{root.parent.span_id:016x}" == "b7ad6b7169203331"
    else:
        assert root.parent is None


def test_an_unsampled_parent_is_left_unsampled():
    assert exported(a_record(traceparent=PARENT.replace("-01", "-00"))) == ()


@pytest.mark.parametrize("route", ["/metrics", "/v1/health/ready", "/v1/health/live", "/health"])
def test_what_machines_ask_every_few_seconds_is_not_traced(route):
    assert exported(a_record(route=route)) == ()


def test_the_service_has_the_set_name_or_opentelemetrys_or_its_own(monkeypatch):
    def name(settings):
        return exported(a_record(), settings=settings)[0].resource.attributes["service.name"]

    assert name(TraceSettings()) == "vlmserve"
    assert name(TraceSettings(service_name="set")) == "set"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "theirs")
    assert name(TraceSettings()) == "theirs"
    assert name(TraceSettings(service_name="set")) == "set"


def test_spans_arrive_at_a_collector_over_http(checkpoint, collector):
    url, got = collector

    async def run():
        engine = ScriptedEngine(lambda request: list(tokens_one_by_one(TOKENIZER, "What?")))
        traces = TraceSettings(endpoint=url, service_name="mine")
        async with client_of(checkpoint, engine, traces=traces) as client:
            for path in GENERATION_ROUTES:
                for stream in (False, True):
                    body = body_for(path, "SECRET", images=[PICTURE], stream=stream)
                    named = {key: MODEL for key in ("model", "model_id") if key in body}
                    headers = {"traceparent": PARENT, "X-Request-Id": f"{path}-{stream}"[-20:]}
                    answer = await client.post(path, json=body | named, headers=headers)
                    assert answer.status_code == 200, answer.text
            await client.get("/nothing/SECRET")

    asyncio.run(run())
    spans = spans_of(got)
    assert {service for service, _ in spans} == {"mine"}
    by_trace = defaultdict(list)
    for _, span in spans:
        by_trace[span.trace_id.hex()].append(span.name)
    expected = {f"POST {path}": 2 for path in GENERATION_ROUTES}
    stages = {stage: 2 * len(GENERATION_ROUTES) for stage in ("images", "queue", "prefill")}
    expected |= stages | {"decode": 2 * len(GENERATION_ROUTES)}
    told = by_trace.pop(TRACE_ID)
    assert {name: told.count(name) for name in set(told)} == expected
    assert list(by_trace.values()) == [["GET unmatched"]]
    assert not [body for _, body in got if b"SECRET" in body]


def test_opentelemetrys_own_variables_name_the_collector(checkpoint, collector, monkeypatch):
    url, got = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    settings = trace_settings(None, None, None, {"OTEL_EXPORTER_OTLP_ENDPOINT": url})

    async def run():
        tracer = Tracer(settings)
        tracer.add(a_record())
        await tracer.close()

    asyncio.run(run())
    assert len(spans_of(got)) == 5


def test_a_collector_that_is_not_there_delays_nothing_for_long(monkeypatch, unused_port):
    """Its sender is waited for: it printed an error after the last test."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")

    async def run():
        tracer = Tracer(TraceSettings(endpoint=f"http://127.0.0.1:{unused_port}"))
        tracer.add(a_record())
        async with asyncio.timeout(FAR_S):
            await tracer.close()

    asyncio.run(run())
    for thread in threading.enumerate():
        if thread.name == "traces":
            thread.join(FAR_S)


@pytest.mark.parametrize(
    ("wanted", "endpoint", "environ", "is_on"),
    [
        (None, None, {}, False),
        (None, "http://c:4318", {}, True),
        (True, None, {}, True),
        (False, "http://c:4318", {}, False),
        (None, None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, True),
        (None, None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c"}, True),
        (True, None, {"OTEL_SDK_DISABLED": "true"}, False),
    ],
)
def test_traces_are_on_where_they_are_wanted_or_an_endpoint_is_set(
    wanted, endpoint, environ, is_on
):
    assert (trace_settings(wanted, endpoint, None, environ) is not None) is is_on


def test_without_the_packages_it_is_one_line_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(start_checks, "TRACE_PACKAGES", ("no_such_package.sdk",))
    with pytest.raises(ValueError, match=r"pip install 'vlmserve\[otel\]'"):
        trace_settings(True, None, None, {})
