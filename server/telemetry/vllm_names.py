"""The metrics under vLLM's names, which routers, autoscalers and dashboards read.

Owns the names and labels. The figures are those of the ordinary names, read once for both.
Source: docs.vllm.ai, "Production Metrics".
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric

from .adapter_metrics import lora_requests_info
from .engine_metrics import EngineMetrics

PREFIX = "vllm:"
# Behind one address: an engine of vLLM has the number of its data-parallel rank.
ENGINE = "0"
SAME_NAME = frozenset(
    {
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
        "gpu_cache_usage_perc", "num_preemptions", "prompt_tokens", "generation_tokens",
        "prefix_cache_queries", "prefix_cache_hits", "time_to_first_token_seconds",
        "time_per_output_token_seconds", "inter_token_latency_seconds",
        "e2e_request_latency_seconds", "request_queue_time_seconds",
        "request_inference_time_seconds", "request_prefill_time_seconds",
        "request_decode_time_seconds", "request_prompt_tokens", "request_generation_tokens",
        "request_params_n", "request_params_max_tokens",
    }
)  # fmt: skip
# vLLM counts its answers by reason under `request_success`, cancelled and failed ones too.
RENAMED = {
    "request_finish": "request_success",
    "vlmserve_image_cache_hits": "mm_cache_hits",
    "vlmserve_drafted_rows": "spec_decode_num_drafts",
    "vlmserve_draft_tokens": "spec_decode_num_draft_tokens",
    "vlmserve_accepted_draft_tokens": "spec_decode_num_accepted_tokens",
}


class WithVllmNames(CollectorRegistry):
    """A registry's metrics, and those that vLLM has too under its names.

    model: the value of the label `model_name`. max_loras: 0 without adapters.
    """

    def __init__(
        self, registry: CollectorRegistry, engine: EngineMetrics, model: str, max_loras: int = 0
    ) -> None:
        super().__init__()
        self._registry = registry
        self._engine = engine
        self._max_loras = max_loras
        self._labels = {"model_name": model, "engine": ENGINE}

    def collect(self) -> Iterator[Metric]:
        """Each metric of the registry, followed by its twin."""
        images: dict[str, float] = {}
        for metric in self._registry.collect():
            yield metric
            if metric.name in SAME_NAME:
                yield self._twin(metric, metric.name)
            elif metric.name in RENAMED:
                yield self._twin(metric, RENAMED[metric.name])
            if metric.name in ("vlmserve_image_cache_hits", "vlmserve_image_cache_misses"):
                images[metric.name] = metric.samples[0].value
        yield self._image_queries(sum(images.values()))
        yield self._cache_config()
        if self._max_loras:
            yield self._lora_info()

    def _twin(self, metric: Metric, name: str) -> Metric:
        twin = Metric(PREFIX + name, metric.documentation, metric.type)
        for sample in metric.samples:
            suffix = sample.name.removeprefix(metric.name)
            twin.add_sample(twin.name + suffix, {**sample.labels, **self._labels}, sample.value)
        return twin

    def _image_queries(self, count: float) -> Metric:
        queries = Metric(f"{PREFIX}mm_cache_queries", "Images looked up in the cache.", "counter")
        queries.add_sample(f"{PREFIX}mm_cache_queries_total", self._labels, count)
        return queries

    def _lora_info(self) -> Metric:
        stats = self._engine.stats
        return lora_requests_info(
            f"{PREFIX}lora_requests_info",
            self._max_loras,
            stats.running_adapters,
            stats.waiting_adapters,
            time.time(),
        )

    def _cache_config(self) -> Metric:
        """Settings of the cache, as labels of a gauge that is always 1."""
        stats = self._engine.stats
        settings = {
            "block_size": str(stats.block_size),
            "num_gpu_blocks": str(stats.text_blocks_total),
        }
        labels = {**settings, **self._labels}
        info = GaugeMetricFamily(
            f"{PREFIX}cache_config_info", "Settings of the cache, as labels.", labels=list(labels)
        )
        info.add_metric(list(labels.values()), 1.0)
        return info
