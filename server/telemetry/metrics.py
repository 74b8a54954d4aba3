"""The metrics at /metrics: those of the documented API, and the usual ones of other servers.

Owns one worker's registry. No label takes its value from a client. Workers under the supervisor
store their metrics in memory-mapped files of one folder (PROMETHEUS_MULTIPROC_DIR). Each worker
reports the sums over all workers, including workers that have died. All are counters and
histograms, except the engine's (`engine_metrics.py`), which all workers report alike.
"""

from __future__ import annotations

import logging
import os
import time
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
from .engine_metrics import EngineMetrics, ReplicaMetrics, RestartMetrics
from .request_record import RequestRecord, current_record

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

# What clients of other servers send and this server drops: the values of a label, so no client's.
USUAL_FOREIGN_FIELDS = frozenset(
    {
        "add_generation_prompt", "add_special_tokens", "allowed_token_ids", "bad_words", "best_of",
        "bootstrap_host", "bootstrap_port", "bootstrap_room", "cache_control", "cache_salt",
        "chat_template", "chat_template_kwargs", "continue_final_message", "custom_logit_processor",
        "custom_params", "data_parallel_rank", "detail", "detokenize", "documents",
        "early_stopping", "ebnf", "echo", "enable_thinking", "extra_body", "extra_key",
        "frequency_penalty", "guided_decoding_backend", "guided_whitespace_pattern", "ignore_eos",
        "images_config", "include_reasoning", "include_stop_str_in_output", "input_ids",
        "kv_transfer_params", "length_penalty", "logit_bias", "logits_processors",
        "logprob_token_ids", "logprobs", "lora_path", "media_io_kwargs", "min_p", "min_tokens",
        "mm_processor_kwargs", "n", "no_stop_trim", "presence_penalty", "priority", "prompt_embeds",
        "prompt_logprobs", "provider", "reasoning", "regex", "repetition_detection",
        "repetition_penalty", "request_id", "return_cached_tokens_details", "return_hidden_states",
        "return_meta_info", "return_prompt_token_ids", "return_routed_experts",
        "return_spec_tokens_details", "return_token_ids", "return_tokens_as_token_ids", "rid",
        "routed_experts_start_len", "seed", "separate_reasoning", "session_id", "session_params",
        "skip_special_tokens", "spaces_between_special_tokens", "stop", "stop_regex",
        "stop_token_ids", "stream_reasoning", "structured_outputs", "task", "thinking",
        "thinking_token_budget", "top_k", "truncate_prompt_tokens", "typical_p",
        "use_audio_in_video", "use_beam_search", "user", "uuid", "vllm_xargs",
    }
)  # fmt: skip


class Metrics:
    """All metrics of one HTTP worker, and those that the engine last reported."""

    def __init__(self, num_request_max: int) -> None:
        _reserve_files()
        self.registry = CollectorRegistry()
        self._engine = EngineMetrics(num_request_max)
        self._replicas: ReplicaMetrics | None = None
        self.registry.register(self._engine)
        self._add_documented_metrics()
        self._add_usual_metrics()
        self._add_http_metrics()

    def start(self, requests: Sequence[AddRequest]) -> RequestTimer:
        """Start to time one request to the engine. requests: one per prompt."""
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
            return generate_latest(self.registry)
        summed = CollectorRegistry()
        MultiProcessCollector(summed)
        summed.register(RestartMetrics(Path(folder)))
        summed.register(self._engine)
        if self._replicas is not None:
            summed.register(self._replicas)
        with unmerged(Path(folder)):
            return generate_latest(summed)

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


class RequestTimer:
    """Times one request in the engine; counts exactly one end of it.

    Writes what it measures into the HTTP request's record too.
    """

    def __init__(self, metrics: Metrics, requests: Sequence[AddRequest]) -> None:
        self._metrics = metrics
        self._record = record = current_record()
        self._admitted = time.monotonic()
        self._first: float | None = None
        self._last: dict[str, float] = {}
        self._num_tokens = 0
        self._queue_s = 0.0
        self._is_over = False
        num_prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
        record.admitted = record.admitted or self._admitted
        record.prompt_tokens += num_prompt_tokens
        metrics.prompt_tokens.inc(num_prompt_tokens)
        metrics.request_prompt_tokens.observe(num_prompt_tokens)
        metrics.request_params_n.observe(len(requests[0].answer_ids))
        metrics.request_params_max_tokens.observe(max(request.max_tokens for request in requests))
        metrics.request_images.observe(sum(len(request.images) for request in requests))

    def tokens(self, request_id: str, count: int, queue_s: float = 0.0) -> None:
        """Count tokens that arrived for one answer. queue_s: from the first output."""
        if not count:
            return
        now = time.monotonic()
        if self._first is None:
            self._observe_first_token(now, queue_s)
        last = self._last.get(request_id)
        if last is not None:
            gap_s = (now - last) / count
            self._metrics.time_per_output_token.observe(gap_s)
            for _ in range(count):
                self._metrics.inter_token_latency.observe(gap_s)
        self._last[request_id] = self._record.last_token = now
        self._num_tokens += count
        self._record.completion_tokens += count
        self._metrics.generation_tokens.inc(count)

    def end_answer(self, reason: Literal["stop", "length", "tool_calls"]) -> None:
        """One of the request's answers is complete."""
        self._record.finish_reasons.append(reason)

    def finish(self, reason: Literal["stop", "length", "tool_calls"]) -> None:
        """The request was answered. reason: the finish reason of its last answer."""
        self._metrics.request_success.inc()
        self._observe_decode()
        self._close(reason)

    def fail(self) -> None:
        """The engine failed the request."""
        self._metrics.request_failure.inc()
        self._record.finish_reasons.append("error")
        self._close("error")

    def leave(self) -> None:
        """The client left. Does nothing after another end."""
        if not self._is_over:
            self._record.finish_reasons.append("abort")
        self._close("abort")

    def _observe_first_token(self, now: float, queue_s: float) -> None:
        self._first, self._queue_s = now, queue_s
        record = self._record
        if record.first_token is None:
            record.first_token, record.queue_s = now, queue_s
        self._metrics.time_to_first_token.observe(now - record.started)
        self._metrics.request_queue_time.observe(queue_s)
        self._metrics.request_prefill_time.observe(max(0.0, now - self._admitted - queue_s))

    def _observe_decode(self) -> None:
        if self._first is not None:
            last = max(self._last.values())
            self._metrics.request_decode_time.observe(last - self._first)
            inference_s = last - self._admitted - self._queue_s
            self._metrics.request_inference_time.observe(max(0.0, inference_s))

    def _close(self, reason: FinishedReason) -> None:
        if self._is_over:
            return
        self._is_over = True
        self._metrics.request_finish.labels(reason).inc()
        self._metrics.e2e_request_latency.observe(time.monotonic() - self._record.started)
        self._metrics.request_generation_tokens.observe(self._num_tokens)
