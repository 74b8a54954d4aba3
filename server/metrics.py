"""The figures at /metrics, under the documented service's names.

Owns one worker's registry. No label takes its value from a client.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..router.messages import EngineStats

_LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 131072)


class EngineFigures(Collector):
    """What the engine last told of itself; the unprefixed names are the documented ones."""

    def __init__(self, num_request_max: int) -> None:
        self.stats = EngineStats()
        self._num_request_max = num_request_max

    def collect(self) -> Iterator[Metric]:
        """Each figure once, as it stands."""
        stats = self.stats
        usage = stats.text_blocks_used / stats.text_blocks_total if stats.text_blocks_total else 0.0
        gauges = {
            "gpu_cache_usage_perc": ("Text blocks in use; 1 is all of them.", usage),
            "num_requests_running": ("Requests in the running batch.", stats.num_running),
            "num_requests_waiting": ("Requests waiting for the batch.", stats.num_waiting),
            "num_request_max": ("Most requests that run at once.", self._num_request_max),
            "vlmserve_text_blocks_used": ("Text blocks in use.", stats.text_blocks_used),
            "vlmserve_text_blocks_total": ("Text blocks there are.", stats.text_blocks_total),
            "vlmserve_image_blocks_used": ("Image blocks (tiles) in use.", stats.image_blocks_used),
            "vlmserve_image_blocks_total": ("Image blocks there are.", stats.image_blocks_total),
            "vlmserve_text_blocks_cached": (
                "Text blocks kept in case they are needed again.",
                stats.text_blocks_cached,
            ),
            "vlmserve_image_blocks_cached": (
                "Image blocks kept in case they are needed again.",
                stats.image_blocks_cached,
            ),
        }
        counters = {
            "vlmserve_steps": ("Steps of the model.", stats.num_steps),
            "vlmserve_preemptions": ("Requests set back for room.", stats.num_preemptions),
            "vlmserve_images_encoded": ("Images encoded.", stats.num_images_encoded),
            "vlmserve_vision_seconds": ("Time in the vision encoder.", stats.vision_seconds),
            **_cache_counters(stats),
        }
        for name, (help_text, value) in gauges.items():
            yield GaugeMetricFamily(name, help_text, value)
        for name, (help_text, value) in counters.items():
            yield CounterMetricFamily(name, help_text, value)


def _cache_counters(stats: EngineStats) -> dict[str, tuple[str, int]]:
    return {
        "vlmserve_image_cache_hits": ("Images found encoded or due.", stats.image_cache_hits),
        "vlmserve_image_cache_misses": ("Images not found.", stats.image_cache_misses),
        "vlmserve_image_cache_evictions": ("Images given up.", stats.image_cache_evictions),
        "vlmserve_prefix_cache_queried_tokens": (
            "Tokens of requests that started.",
            stats.prefix_tokens_queried,
        ),
        "vlmserve_prefix_cache_hit_tokens": (
            "Tokens found computed when their request started.",
            stats.prefix_tokens_hit,
        ),
    }


class Metrics:
    """All figures of one HTTP worker, and the engine's counts as it last told them."""

    def __init__(self, num_request_max: int) -> None:
        self.registry = CollectorRegistry()
        self._engine = EngineFigures(num_request_max)
        self.registry.register(self._engine)
        self._add_request_figures()

    def start(self, num_prompt_tokens: int) -> RequestTimer:
        """Begin to time one request."""
        return RequestTimer(self, num_prompt_tokens)

    def expire(self) -> None:
        """A request's time was over before it could be admitted."""
        self.request_failure.inc()
        self.request_finish.labels("error").inc()

    def render(self, stats: EngineStats) -> bytes:
        """All figures in Prometheus' text format."""
        self._engine.stats = stats
        return generate_latest(self.registry)

    def _add_request_figures(self) -> None:
        registry = self.registry
        self.prompt_tokens = Counter("prompt_tokens", "Prompt tokens taken.", registry=registry)
        self.generation_tokens = Counter(
            "generation_tokens", "Tokens generated.", registry=registry
        )
        self.time_to_first_token = Histogram(
            "time_to_first_token_seconds",
            "From admission to the first token.",
            buckets=_LATENCY_S,
            registry=registry,
        )
        self.time_per_output_token = Histogram(
            "time_per_output_token_seconds",
            "Between two tokens of a request.",
            buckets=_TOKEN_S,
            registry=registry,
        )
        self.e2e_request_latency = Histogram(
            "e2e_request_latency_seconds",
            "From admission to the last token.",
            buckets=_LATENCY_S,
            registry=registry,
        )
        self.request_prompt_tokens = Histogram(
            "request_prompt_tokens", "Prompt tokens a request.", buckets=_TOKENS, registry=registry
        )
        self.request_generation_tokens = Histogram(
            "request_generation_tokens",
            "Generated tokens a request.",
            buckets=_TOKENS,
            registry=registry,
        )
        self.request_finish = Counter(
            "request_finish",
            "Requests that ended, by reason.",
            ["finished_reason"],
            registry=registry,
        )
        self.request_success = Counter(
            "request_success", "Requests answered to their end.", registry=registry
        )
        self.request_failure = Counter(
            "request_failure",
            "Requests that failed in the engine, or whose time was over before it.",
            registry=registry,
        )


class RequestTimer:
    """One request's times; exactly one of its ends is counted."""

    def __init__(self, metrics: Metrics, num_prompt_tokens: int) -> None:
        self._metrics = metrics
        self._began = self._last = time.monotonic()
        self._num_prompt_tokens = num_prompt_tokens
        self._num_tokens = 0
        self._outcome: str | None = None
        metrics.prompt_tokens.inc(num_prompt_tokens)
        metrics.request_prompt_tokens.observe(num_prompt_tokens)

    def tokens(self, count: int) -> None:
        """Some tokens came."""
        now = time.monotonic()
        if self._num_tokens == 0:
            self._metrics.time_to_first_token.observe(now - self._began)
        elif count:
            self._metrics.time_per_output_token.observe((now - self._last) / count)
        self._num_tokens += count
        self._last = now
        self._metrics.generation_tokens.inc(count)

    def finish(self, reason: Literal["stop", "length", "tool_calls"]) -> None:
        """The request was answered."""
        self._metrics.request_success.inc()
        self._close(reason)

    def fail(self) -> None:
        """The engine failed the request."""
        self._metrics.request_failure.inc()
        self._close("error")

    def leave(self) -> None:
        """Nobody waits any more; without effect after another end."""
        self._close("abort")

    @property
    def summary(self) -> str:
        """One line for the log; it tells no word of prompt or answer."""
        return (
            f"{self._outcome or 'running'}, {self._num_prompt_tokens} prompt tokens,"
            f" {self._num_tokens} generated, {time.monotonic() - self._began:.3f} s"
        )

    def _close(self, reason: str) -> None:
        if self._outcome is not None:
            return
        self._outcome = reason
        self._metrics.request_finish.labels(reason).inc()
        self._metrics.e2e_request_latency.observe(time.monotonic() - self._began)
        self._metrics.request_generation_tokens.observe(self._num_tokens)
