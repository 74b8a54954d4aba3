"""The metrics at /metrics: those of the documented API, and the usual ones of other servers.

Owns one worker's registry. No label takes its value from a client. Workers under the supervisor
store their metrics in memory-mapped files of one folder (PROMETHEUS_MULTIPROC_DIR). Each worker
reports the sums over all workers, including workers that have died. All are counters and
histograms, except the engine's (`engine_metrics.py`), which all workers report alike.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import prometheus_client.values
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

from ...router.client.replica_pool import MOVE_REASONS, MoveReason, ReplicaState
from ...router.messages import AddRequest, EngineStats
from ..admission.lanes import LANE_NAMES
from ..prompts.rendering import META_REASONS
from ..supervisor.ended_metrics import reserve, unmerged
from ..supervisor.restart_counter import RestartCounts
from .adapter_metrics import MAX_LABELS, OTHER, AdapterCounter
from .engine_metrics import EngineMetrics, ReplicaMetrics, RestartMetrics
from .request_record import RequestRecord
from .request_timer import RequestTimer
from .usual_fields import USUAL_FOREIGN_FIELDS
from .vllm_names import WithVllmNames

logger = logging.getLogger(__name__)

# The creation time of each metric would double the page, and it cannot be summed.
disable_created_metrics()
# prometheus_client stores metrics in this folder if it is set at import.
METRICS_FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

_LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_LAG_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 131072)
_FEW = (0, 1, 2, 4, 8, 16, 32, 64, 128)

FinishedReason = Literal["stop", "length", "tool_calls", "abort", "error"]
FINISHED_REASONS: tuple[FinishedReason, ...] = ("stop", "length", "tool_calls", "abort", "error")


class Metrics:
    """All metrics of one HTTP worker, and those that the engine last reported."""

    def __init__(
        self, num_request_max: int, vllm_model: str | None = None, max_loras: int = 0
    ) -> None:
        """vllm_model: report under vLLM's names too, with this name of the model as a label."""
        _reserve_files()
        self.registry = CollectorRegistry()
        self._vllm_model = vllm_model
        self._max_loras = max_loras
        self._engine = EngineMetrics(num_request_max)
        self._replicas: ReplicaMetrics | None = None
        self.registry.register(self._engine)
        self._add_documented_metrics()
        self._add_usual_metrics()
        self._add_http_metrics()

    def start(self, requests: Sequence[AddRequest]) -> RequestTimer:
        """Start to time one request to the engine. requests: one per prompt."""
        self.adapters.count(requests[0].adapter)
        return RequestTimer(self, requests)

    def fail_early(self) -> None:
        """Count a request that failed before the engine: over its deadline or no room."""
        self.request_failure.inc()
        self.request_finish.labels("error").inc()

    def count_refusal(self, lane: str) -> None:
        """Count work that a lane refused. lane: one of LANE_NAMES."""
        self.lane_refusals.labels(lane.replace(" ", "_")).inc()

    def count_meta_format(self, reason: str) -> None:
        """Count a conversation in Meta's format. reason: one of META_REASONS."""
        self.meta_format_prompts.labels(reason).inc()

    def watch_replicas(self, states: Callable[[], Sequence[ReplicaState]]) -> None:
        """Report each replica by itself too."""
        self._replicas = ReplicaMetrics(states)
        self.registry.register(self._replicas)
        self.replica_moves = self._counter(
            "vlmserve_replica_moves",
            "Requests retried on another replica. reason=full: the first replica's queue was full; "
            "dead: it died before starting them.",
            ["reason"],
        )
        for reason in MOVE_REASONS:
            self.replica_moves.labels(reason)

    def count_move(self, reason: MoveReason) -> None:
        """Count a request that is retried on another replica."""
        self.replica_moves.labels(reason).inc()

    def count_http(self, record: RequestRecord) -> None:
        """Count an HTTP request that has ended, of any route."""
        self.http_requests.labels(record.method, record.route, str(record.status)).inc()
        if record.images_started is not None and record.images_ended is not None:
            self.image_load_time.observe(record.images_ended - record.images_started)

    def count_ignored_field(self, name: str) -> None:
        """Count a request field that was dropped. A name that is not usual counts as other."""
        self.ignored_fields.labels(name if name in USUAL_FOREIGN_FIELDS else "other").inc()

    def render(self, stats: EngineStats) -> bytes:
        """All metrics in Prometheus' text format, summed over all workers."""
        self._engine.stats = stats
        folder = os.environ.get(METRICS_FOLDER_VARIABLE)
        if folder is None:
            return self._text_of(self.registry)
        summed = _summed()
        summed.register(RestartMetrics(Path(folder)))
        summed.register(self._engine)
        if self._replicas is not None:
            summed.register(self._replicas)
        with unmerged(Path(folder)):
            return self._text_of(summed)

    def _text_of(self, registry: CollectorRegistry) -> bytes:
        if self._vllm_model is None:
            return generate_latest(registry)
        return generate_latest(
            WithVllmNames(registry, self._engine, self._vllm_model, self._max_loras)
        )

    def replica_states(self) -> list[ReplicaState]:
        """Each replica's state; empty with one engine."""
        return [] if self._replicas is None else list(self._replicas.states())

    def restarts(self) -> RestartCounts:
        """What the supervisor restarted."""
        folder = os.environ.get(METRICS_FOLDER_VARIABLE)
        return RestartCounts() if folder is None else RestartCounts.read(Path(folder))

    def totals(self) -> dict[str, float]:
        """The counters of all workers, by name."""
        folder = os.environ.get(METRICS_FOLDER_VARIABLE)
        if folder is None:
            return _totals(self.registry)
        with unmerged(Path(folder)):
            return _totals(_summed())

    def _add_documented_metrics(self) -> None:
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of accepted requests.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds",
            "Seconds from a request's arrival to its first token.",
            _LATENCY_S,
        )
        self.time_per_output_token = self._histogram(
            "time_per_output_token_seconds",
            "Seconds between two tokens of an answer, observed once per output.",
            _TOKEN_S,
        )
        self.e2e_request_latency = self._histogram(
            "e2e_request_latency_seconds",
            "Seconds from a request's arrival to its last token.",
            _LATENCY_S,
        )
        self.request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens per request.", _TOKENS
        )
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Generated tokens per request.", _TOKENS
        )
        self.request_finish = self._counter(
            "request_finish", "Requests that ended, by finish reason.", ["finished_reason"]
        )
        for reason in FINISHED_REASONS:
            self.request_finish.labels(reason)
        self.request_success = self._counter("request_success", "Requests answered completely.")
        self.request_failure = self._counter(
            "request_failure",
            "Requests that failed in the engine, or passed their deadline before it.",
        )

    def _add_usual_metrics(self) -> None:
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds",
            "Seconds between two tokens of an answer, observed once per token.",
            _TOKEN_S,
        )
        self.request_queue_time = self._histogram(
            "request_queue_time_seconds",
            "Seconds in the engine's queue before the first step.",
            _LATENCY_S,
        )
        self.request_prefill_time = self._histogram(
            "request_prefill_time_seconds",
            "Seconds from the first step to the first token.",
            _LATENCY_S,
        )
        self.request_decode_time = self._histogram(
            "request_decode_time_seconds",
            "Seconds from the first token to the last token.",
            _LATENCY_S,
        )
        self.request_inference_time = self._histogram(
            "request_inference_time_seconds",
            "Seconds from the first step to the last token.",
            _LATENCY_S,
        )
        self.request_params_n = self._histogram("request_params_n", "Answers per request.", _FEW)
        self.request_params_max_tokens = self._histogram(
            "request_params_max_tokens", "Maximum tokens of an answer, per request.", _TOKENS
        )
        self.request_images = self._histogram("request_images", "Images per request.", _FEW)
        self.image_load_time = self._histogram(
            "image_load_time_seconds", "Seconds to fetch and decode a request's images.", _LATENCY_S
        )

    def _add_http_metrics(self) -> None:
        self.lane_refusals = self._counter(
            "vlmserve_lane_refusals",
            "Work before the engine that was rejected with 429, by the lane that was full.",
            ["lane"],
        )
        for lane in LANE_NAMES:
            self.lane_refusals.labels(lane.replace(" ", "_"))
        self.meta_format_prompts = self._counter(
            "vlmserve_meta_format_prompts",
            "Conversations in Meta's format instead of the chat template's, by reason.",
            ["reason"],
        )
        for reason in META_REASONS:
            self.meta_format_prompts.labels(reason)
        self.http_requests = self._counter(
            "vlmserve_http_requests",
            "HTTP requests that ended. status=499: the client closed the connection.",
            ["method", "route", "status"],
        )
        self.adapters = AdapterCounter(
            self._counter(
                "vlmserve_adapter_requests",
                f"Requests by adapter; names after the first {MAX_LABELS} of a worker count as "
                f"{OTHER}.",
                ["adapter"],
            )
        )
        self.form_dead_ends = self._counter(
            "vlmserve_form_dead_ends",
            "Answers that failed because no token could follow in their form.",
        )
        self.ignored_fields = self._counter(
            "vlmserve_ignored_fields",
            "Unknown request fields that the server dropped. field=other: a name that is not in "
            "the server's list of usual ones.",
            ["field"],
        )
        self.ignored_fields.labels("other")
        self.event_loop_lag = self._histogram(
            "vlmserve_event_loop_lag_seconds", "Lag of the event loop in seconds.", _LAG_S
        )

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)


def _summed() -> CollectorRegistry:
    """What the workers counted, summed over all of them."""
    summed = CollectorRegistry()
    MultiProcessCollector(summed)
    return summed


def _totals(registry: CollectorRegistry) -> dict[str, float]:
    totals: dict[str, float] = {}
    for family in registry.collect():
        for sample in family.samples if family.type == "counter" else ():
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


def _reserve_files() -> None:
    """Reserve this worker's files; without room on disk, keep its metrics in memory only."""
    folder = os.environ.get(METRICS_FOLDER_VARIABLE)
    if folder is None:
        return
    try:
        reserve(Path(folder), os.getpid())
    except OSError as error:
        logger.warning("/metrics of this worker counts its own requests only: %s", error.strerror)
        del os.environ[METRICS_FOLDER_VARIABLE]
        prometheus_client.values.ValueClass = prometheus_client.values.MutexValue
