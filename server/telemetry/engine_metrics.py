"""What engines and the supervisor tell of themselves, as figures of Prometheus.

Owns their names and words. Every worker hears the same of them: of several workers'
figures these are taken from one, not summed. Those of several engines are sums over all;
`ReplicaFigures` tells of each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from ...router.client.replica_pool import ReplicaState
from ...router.messages import VISION_BOUNDS_S, EngineStats
from ..supervisor.restart_counter import RestartCounts


class EngineFigures(Collector):
    """What the engine last told of itself; the unprefixed names are the documented ones."""

    def __init__(self, num_request_max: int) -> None:
        self.stats = EngineStats()
        self._num_request_max = num_request_max

    def collect(self) -> Iterator[Metric]:
        """Each figure once, as it stands."""
        for name, (help_text, value) in self._gauges().items():
            yield GaugeMetricFamily(name, help_text, value)
        for name, (help_text, value) in _counters(self.stats).items():
            yield CounterMetricFamily(name, help_text, value)
        yield _vision_latency(self.stats)

    def _gauges(self) -> dict[str, tuple[str, float]]:
        stats = self.stats
        usage = stats.text_blocks_used / stats.text_blocks_total if stats.text_blocks_total else 0.0
        return {
            "gpu_cache_usage_perc": ("Text blocks in use; 1 is all of them.", usage),
            "kv_cache_usage_perc": ("The same, under its newer name.", usage),
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


class ReplicaFigures(Collector):
    """What each of several replicas last told, by its number."""

    def __init__(self, states: Callable[[], Sequence[ReplicaState]]) -> None:
        self._states = states

    def collect(self) -> Iterator[Metric]:
        """Each figure once for each replica, as it stands."""
        states = self._states()
        for name, (help_text, value_of) in _REPLICA_GAUGES.items():
            family = GaugeMetricFamily(f"vlmserve_replica_{name}", help_text, labels=["replica"])
            for number, state in enumerate(states):
                family.add_metric([str(number)], value_of(state))
            yield family


_REPLICA_GAUGES: dict[str, tuple[str, Callable[[ReplicaState], float]]] = {
    "ready": ("1 while this replica takes requests.", lambda one: float(one.is_ready)),
    "requests_running": ("Requests in its running batch.", lambda one: one.stats.num_running),
    "requests_waiting": ("Requests in its queue.", lambda one: one.stats.num_waiting),
    "text_blocks_used": ("Its text blocks in use.", lambda one: one.stats.text_blocks_used),
    "image_blocks_used": ("Its image blocks in use.", lambda one: one.stats.image_blocks_used),
    "steps": ("Steps of the model since it started.", lambda one: one.stats.num_steps),
}


class RestartFigures(Collector):
    """How often the supervisor started a process again. folder: where it writes that."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Metric]:
        """One counter, each of whose labels has two values."""
        family = CounterMetricFamily(
            "vlmserve_restarts",
            "Processes that were started again: as they had ended, or were ended as they hung.",
            labels=["process", "reason"],
        )
        counts = RestartCounts.read(self._folder)
        for process, of_process in (("engine", counts.engine), ("worker", counts.worker)):
            for reason, count in of_process.items():
                family.add_metric([process, reason], count)
        yield family


def engine_families() -> frozenset[str]:
    """The names of the families that every worker tells alike, for whoever adds up workers."""
    return frozenset(family.name for family in EngineFigures(1).collect())


def _counters(stats: EngineStats) -> dict[str, tuple[str, float]]:
    queried, hit = stats.prefix_tokens_queried, stats.prefix_tokens_hit
    return {
        "num_preemptions": ("Requests set back for room.", stats.num_preemptions),
        "prefix_cache_queries": ("Tokens of requests that started.", queried),
        "prefix_cache_hits": ("Tokens found computed when their request started.", hit),
        "vlmserve_steps": ("Steps of the model.", stats.num_steps),
        "vlmserve_preemptions": ("Requests set back for room.", stats.num_preemptions),
        "vlmserve_images_encoded": ("Images encoded.", stats.num_images_encoded),
        "vlmserve_vision_seconds": ("Time in the vision encoder.", stats.vision_seconds),
        "vlmserve_image_cache_hits": ("Images found encoded or due.", stats.image_cache_hits),
        "vlmserve_image_cache_misses": ("Images not found.", stats.image_cache_misses),
        "vlmserve_image_cache_evictions": ("Images given up.", stats.image_cache_evictions),
        "vlmserve_prefix_cache_queried_tokens": ("Tokens of requests that started.", queried),
        "vlmserve_prefix_cache_hit_tokens": (
            "Tokens found computed when their request started.",
            hit,
        ),
    }


def _vision_latency(stats: EngineStats) -> HistogramMetricFamily:
    counts = stats.vision_step_counts or [0] * (len(VISION_BOUNDS_S) + 1)
    labels = [*map(str, VISION_BOUNDS_S), "+Inf"]
    totals = itertools.accumulate(counts)
    return HistogramMetricFamily(
        "vision_encoder_latency_seconds",
        "Time of a step in the vision encoder, of steps that encode images.",
        buckets=list(zip(labels, map(float, totals), strict=True)),
        sum_value=stats.vision_seconds,
    )
