"""The live counts: what the page's engine panel shows, from the numbers behind /metrics.

Owns which counts there are, and how many readers may watch. Counts are made when a reader asks,
at most twice a second; without readers nothing runs. Knows nothing of HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, TypedDict

from ...router.client.replica_pool import ReplicaState
from ...router.messages import EngineStats
from ..errors import OverloadedError
from ..supervisor.restart_counter import RestartCounts
from .metrics import Metrics

# Open pages of one worker that watch the engine.
MAX_WATCHERS = 32
MIN_AGE_S = 0.5


class PoolCounts(TypedDict):
    """Blocks of a pool. cached: kept for reuse; the rest of total is free."""

    used: int
    cached: int
    total: int


class CacheCounts(TypedDict):
    """What was looked up in the caches, and what was found; counters."""

    image_cache_hits: int
    image_cache_misses: int
    prefix_tokens_queried: int
    prefix_tokens_hit: int


class ReplicaCounts(CacheCounts):
    """One engine. Counters are since it started; restarts: since the server started."""

    is_ready: bool
    running: int
    waiting: int
    steps: int
    preemptions: int
    restarts: int
    text_blocks: PoolCounts
    image_blocks: PoolCounts


class LiveCounts(CacheCounts):
    """Counts at one moment, over all engines and workers.

    time_s: the worker's clock, for differences only. steps and what follows are counters; replicas:
    each engine by itself.
    """

    time_s: float
    is_ready: bool
    running: int
    waiting: int
    text_blocks: PoolCounts
    image_blocks: PoolCounts
    steps: int
    generated_tokens: int
    prompt_tokens: int
    images_encoded: int
    vision_s: float
    preemptions: int
    engine_restarts: int
    worker_restarts: int
    replicas: list[ReplicaCounts]


class Engine(Protocol):
    """The part of an engine's client that is used."""

    @property
    def stats(self) -> EngineStats: ...


class LiveFeed:
    """Makes the live counts for all readers of one worker."""

    def __init__(self, metrics: Metrics, engine: Engine) -> None:
        self._metrics = metrics
        self._engine = engine
        self._last: LiveCounts | None = None
        self.num_watchers = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Count a reader while the block runs. Raises OverloadedError if there are too many."""
        if self.num_watchers >= MAX_WATCHERS:
            raise OverloadedError(
                f"{MAX_WATCHERS} pages watch this worker already: close one", retry_after_s=5.0
            )
        self.num_watchers += 1
        try:
            yield
        finally:
            self.num_watchers -= 1

    def counts(self, *, is_ready: bool) -> LiveCounts:
        """The counts now; those of another reader if they are under half a second old."""
        now = time.monotonic()
        if self._last is None or now - self._last["time_s"] >= MIN_AGE_S:
            states = self._metrics.replica_states() or [ReplicaState(is_ready, self._engine.stats)]
            restarts, totals = self._metrics.restarts(), self._metrics.totals()
            self._last = _counts(now, is_ready, self._engine.stats, states, totals, restarts)
        return self._last


def _counts(
    now: float,
    is_ready: bool,
    stats: EngineStats,
    states: list[ReplicaState],
    totals: Mapping[str, float],
    restarts: RestartCounts,
) -> LiveCounts:
    of_replicas = restarts.of_replicas
    return {
        "time_s": now,
        "is_ready": is_ready,
        "running": stats.num_running,
        "waiting": stats.num_waiting,
        "text_blocks": _text_blocks(stats),
        "image_blocks": _image_blocks(stats),
        "steps": stats.num_steps,
        "generated_tokens": int(totals.get("generation_tokens_total", 0)),
        "prompt_tokens": int(totals.get("prompt_tokens_total", 0)),
        "images_encoded": stats.num_images_encoded,
        "vision_s": stats.vision_seconds,
        **_caches(stats),
        "preemptions": stats.num_preemptions,
        "engine_restarts": sum(restarts.engine.values()),
        "worker_restarts": sum(restarts.worker.values()),
        "replicas": [_replica(state, of_replicas.get(i, 0)) for i, state in enumerate(states)],
    }


def _replica(state: ReplicaState, restarts: int) -> ReplicaCounts:
    stats = state.stats
    return {
        "is_ready": state.is_ready,
        "running": stats.num_running,
        "waiting": stats.num_waiting,
        "steps": stats.num_steps,
        "preemptions": stats.num_preemptions,
        "restarts": restarts,
        "text_blocks": _text_blocks(stats),
        "image_blocks": _image_blocks(stats),
        **_caches(stats),
    }


def _caches(stats: EngineStats) -> CacheCounts:
    return {
        "image_cache_hits": stats.image_cache_hits,
        "image_cache_misses": stats.image_cache_misses,
        "prefix_tokens_queried": stats.prefix_tokens_queried,
        "prefix_tokens_hit": stats.prefix_tokens_hit,
    }


def _text_blocks(stats: EngineStats) -> PoolCounts:
    return {
        "used": stats.text_blocks_used,
        "cached": stats.text_blocks_cached,
        "total": stats.text_blocks_total,
    }


def _image_blocks(stats: EngineStats) -> PoolCounts:
    return {
        "used": stats.image_blocks_used,
        "cached": stats.image_blocks_cached,
        "total": stats.image_blocks_total,
    }
