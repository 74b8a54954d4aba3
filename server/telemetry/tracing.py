"""OpenTelemetry traces: one span per request, with spans for images, queue, prefill and decode.

Owns the names and attributes of spans, and their export to a collector. Spans are created from
a record when its request has ended, so that a running request never waits for them. Needs the
extra `otel`: import this module only if traces are enabled. Knows nothing of how times are taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ... import __version__
from ..settings import TraceSettings
from .request_record import RequestRecord

DEFAULT_NAME = "vlmserve"
TRACES_PATH = "/v1/traces"
# A collector that does not answer must not delay the exit of a worker.
CLOSE_TIMEOUT_S = 2.0
# Probes call these every few seconds: their traces would only fill the collector.
UNTRACED = frozenset({"/v1/health/live", "/v1/health/ready", "/health", "/metrics", "/v1/metrics"})


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a request; times are of `time.monotonic()`."""

    name: str
    started: float
    ended: float


class Tracer:
    """Exports a trace of each closed record.

    exporter: replaces OTLP over HTTP in tests.
    """

    def __init__(self, settings: TraceSettings, exporter: SpanExporter | None = None) -> None:
        # The SDK's own exit handler would wait for the collector: `close` has a time limit.
        self._provider = TracerProvider(resource=_resource(settings), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or _exporter(settings)))
        self._tracer = self._provider.get_tracer(DEFAULT_NAME, __version__)

    def add(self, record: RequestRecord) -> None:
        """Trace a request that has ended, as a child of the span in its traceparent."""
        if record.route in UNTRACED:
            return
        span = self._tracer.start_span(
            f"{record.method} {record.route}",
            context=_parent_of(record),
            kind=SpanKind.SERVER,
            attributes=_attributes(record),
            start_time=record.started_ns,
        )
        if record.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        below = set_span_in_context(span)
        for stage in stages_of(record):
            started_ns, ended_ns = _ns(record, stage.started), _ns(record, stage.ended)
            self._tracer.start_span(stage.name, below, start_time=started_ns).end(ended_ns)
        span.end(_ns(record, record.started + record.total_s))

    async def close(self) -> None:
        """Export the remaining spans, for at most CLOSE_TIMEOUT_S."""
        loop = asyncio.get_running_loop()
        is_done = asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            with contextlib.suppress(RuntimeError):  # the loop may be closed already
                loop.call_soon_threadsafe(is_done.set)

        threading.Thread(target=shut_down, name="traces", daemon=True).start()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(is_done.wait(), CLOSE_TIMEOUT_S)


def stages_of(record: RequestRecord) -> Iterator[Stage]:
    """The stages that a request reached, in order."""
    if record.images_started is not None and record.images_ended is not None:
        yield Stage("images", record.images_started, record.images_ended)
    if record.admitted is None or record.first_token is None or record.last_token is None:
        return
    ran = min(record.admitted + (record.queue_s or 0.0), record.first_token)
    yield Stage("queue", record.admitted, ran)
    yield Stage("prefill", ran, record.first_token)
    yield Stage("decode", record.first_token, record.last_token)


def _attributes(record: RequestRecord) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "http.request.method": record.method,
        "http.route": record.route,
        "http.response.status_code": record.status,
        "vlmserve.request_id": record.request_id,
    }
    if not record.is_generation:
        return attributes
    return attributes | {
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "gen_ai.response.finish_reasons": record.finish_reasons,
        "vlmserve.images": record.num_images,
    }


def _parent_of(record: RequestRecord) -> Context:
    """The client's span; none if its header is missing or invalid."""
    headers = {"traceparent": record.traceparent, "tracestate": record.tracestate}
    carrier = {name: value for name, value in headers.items() if value is not None}
    return TraceContextTextMapPropagator().extract(carrier, Context())


def _ns(record: RequestRecord, moment: float) -> int:
    return record.started_ns + int((moment - record.started) * 1e9)


def _resource(settings: TraceSettings) -> Resource:
    """The resource of OpenTelemetry's own variables, with the configured service name."""
    found = Resource.create({SERVICE_VERSION: __version__})
    name = settings.service_name
    if name is None and str(found.attributes[SERVICE_NAME]).startswith("unknown_service"):
        name = DEFAULT_NAME
    return found if name is None else found.merge(Resource({SERVICE_NAME: name}))


def _exporter(settings: TraceSettings) -> SpanExporter:
    if settings.endpoint is None:
        return OTLPSpanExporter()
    base = settings.endpoint.rstrip("/")
    return OTLPSpanExporter(base if base.endswith(TRACES_PATH) else base + TRACES_PATH)
