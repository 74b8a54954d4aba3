"""The metrics that engines and the supervisor report, in Prometheus' terms.

Owns their names and help texts. Every worker receives the same reports, so these metrics are
taken from one worker, never summed over workers. With several engines they are sums over all;
`ReplicaMetrics` has the metrics of each.
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


class EngineMetrics(Collector):
    """The engine's last report. The names without a prefix are those of the documented API."""

    def __init__(self, num_request_max: int) -> None:
        self.stats = EngineStats()
        self._num_request_max = num_request_max

    def collect(self) -> Iterator[Metric]:
        """Each metric once, with its present value."""
        for name, (help_text, value) in self._gauges().items():
            yield GaugeMetricFamily(name, help_text, value)
        for name, (help_text, value) in _counters(self.stats).items():
            yield CounterMetricFamily(name, help_text, value)
        yield _vision_latency(self.stats)

    def _gauges(self) -> dict[str, tuple[str, float]]:
        stats = self.stats
        usage = stats.text_blocks_used / stats.text_blocks_total if stats.text_blocks_total else 0.0
        return {
            "gpu_cache_usage_perc": ("Share of text blocks in use, from 0 to 1.", usage),
            "kv_cache_usage_perc": ("Share of text blocks in use; newer name.", usage),
            "num_requests_running": ("Requests in the running batch.", stats.num_running),
            "num_requests_waiting": ("Requests in the queue.", stats.num_waiting),
            "num_request_max": ("Maximum number of running requests.", self._num_request_max),
            "vlmserve_text_blocks_used": ("Text blocks in use.", stats.text_blocks_used),
            "vlmserve_text_blocks_total": ("Text blocks in total.", stats.text_blocks_total),
            "vlmserve_image_blocks_used": ("Image blocks (tiles) in use.", stats.image_blocks_used),
            "vlmserve_image_blocks_total": ("Image blocks in total.", stats.image_blocks_total),
            "vlmserve_text_blocks_cached": (
                "Text blocks cached for reuse.",
                stats.text_blocks_cached,
            ),
            "vlmserve_image_blocks_cached": (
                "Image blocks cached for reuse.",
                stats.image_blocks_cached,
            ),
            "vlmserve_image_host_bytes": (
                "Bytes of encoded images in host memory, after the last write.",
                stats.image_host_bytes,
            ),
        }


class ReplicaMetrics(Collector):
    """The last report of each replica, labelled with its number."""

    def __init__(self, states: Callable[[], Sequence[ReplicaState]]) -> None:
        self.states = states

    def collect(self) -> Iterator[Metric]:
        """Each metric once per replica, with its present value."""
        states = self.states()
        for name, (help_text, value_of) in _REPLICA_GAUGES.items():
            family = GaugeMetricFamily(f"vlmserve_replica_{name}", help_text, labels=["replica"])
            for number, state in enumerate(states):
                family.add_metric([str(number)], value_of(state))
            yield family


_REPLICA_GAUGES: dict[str, tuple[str, Callable[[ReplicaState], float]]] = {
    "ready": ("1 while the replica accepts requests.", lambda state: float(state.is_ready)),
    "requests_running": (
        "Requests in the replica's running batch.",
        lambda state: state.stats.num_running,
    ),
    "requests_waiting": ("Requests in the replica's queue.", lambda state: state.stats.num_waiting),
    "text_blocks_used": (
        "Text blocks in use on the replica.",
        lambda state: state.stats.text_blocks_used,
    ),
    "image_blocks_used": (
        "Image blocks in use on the replica.",
        lambda state: state.stats.image_blocks_used,
    ),
    "steps": ("Model steps since the replica started.", lambda state: state.stats.num_steps),
}


class RestartMetrics(Collector):
    """How often the supervisor restarted processes. folder: where it writes the counts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Metric]:
        """One counter, by process (engine, worker) and reason (ended, hung)."""
        family = CounterMetricFamily(
            "vlmserve_restarts",
            "Restarted processes. reason=ended: the process exited; hung: it stopped responding.",
            labels=["process", "reason"],
        )
        counts = RestartCounts.read(self._folder)
        for process, of_process in (("engine", counts.engine), ("worker", counts.worker)):
            for reason, count in of_process.items():
                family.add_metric([process, reason], count)
        yield family


def engine_families() -> frozenset[str]:
    """The names of the metrics that all workers report alike: do not sum these over workers."""
    return frozenset(family.name for family in EngineMetrics(1).collect())


def _counters(stats: EngineStats) -> dict[str, tuple[str, float]]:
    queried, hit = stats.prefix_tokens_queried, stats.prefix_tokens_hit
    return {
        "num_preemptions": ("Requests preempted to free blocks.", stats.num_preemptions),
        "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", queried),
        "prefix_cache_hits": ("Prompt tokens found in the prefix cache.", hit),
        "vlmserve_steps": ("Model steps.", stats.num_steps),
        "vlmserve_preemptions": ("Requests preempted to free blocks.", stats.num_preemptions),
        "vlmserve_drafted_rows": ("Times a request had drafts in a step.", stats.num_drafts),
        "vlmserve_draft_tokens": ("Drafts, with --speculative.", stats.num_draft_tokens),
        "vlmserve_accepted_draft_tokens": (
            "Drafts that became tokens of answers.",
            stats.num_accepted_tokens,
        ),
        "vlmserve_images_encoded": ("Images encoded.", stats.num_images_encoded),
        "vlmserve_vision_seconds": ("Seconds spent in the vision encoder.", stats.vision_seconds),
        "vlmserve_image_cache_hits": (
            "Images found in the image cache, or already being encoded.",
            stats.image_cache_hits,
        ),
        "vlmserve_image_cache_misses": (
            "Images not found in the image cache.",
            stats.image_cache_misses,
        ),
        "vlmserve_image_cache_evictions": (
            "Images evicted from the image cache.",
            stats.image_cache_evictions,
        ),
        **_host_counters(stats),
        "vlmserve_prefix_cache_queried_tokens": (
            "Prompt tokens looked up in the prefix cache.",
            queried,
        ),
        "vlmserve_prefix_cache_hit_tokens": (
            "Prompt tokens found in the prefix cache.",
            hit,
        ),
    }


def _host_counters(stats: EngineStats) -> dict[str, tuple[str, float]]:
    return {
        "vlmserve_image_host_hits": (
            "Images read from host memory instead of encoded.",
            stats.image_host_hits,
        ),
        "vlmserve_image_host_misses": (
            "Images looked up in host memory and not found.",
            stats.image_host_misses,
        ),
        "vlmserve_image_host_evictions": (
            "Images evicted from host memory.",
            stats.image_host_evictions,
        ),
        "vlmserve_image_host_damaged": (
            "Images in host memory that were damaged, and removed.",
            stats.image_host_damaged,
        ),
        "vlmserve_image_host_dropped": (
            "Images not written to host memory because writing was behind.",
            stats.image_host_dropped,
        ),
    }


def _vision_latency(stats: EngineStats) -> HistogramMetricFamily:
    counts = stats.vision_step_counts or [0] * (len(VISION_BOUNDS_S) + 1)
    labels = [*map(str, VISION_BOUNDS_S), "+Inf"]
    totals = itertools.accumulate(counts)
    return HistogramMetricFamily(
        "vision_encoder_latency_seconds",
        "Seconds in the vision encoder per step that encodes images.",
        buckets=list(zip(labels, map(float, totals), strict=True)),
        sum_value=stats.vision_seconds,
    )
