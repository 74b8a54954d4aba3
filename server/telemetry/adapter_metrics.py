"""Requests by adapter, with a bounded number of labels."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import Counter
from prometheus_client.core import GaugeMetricFamily, Metric

from ...models.batch import AdapterRef

# Names beyond count as OTHER: a label's series stays for as long as the server runs.
MAX_LABELS = 64
OTHER = "other"


class AdapterCounter:
    """Counts the requests of each adapter. counter: with the label `adapter`."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._names: set[str] = set()

    def count(self, adapter: AdapterRef | None) -> None:
        """Count a request to the engine; nothing for one of the base model."""
        if adapter is None:
            return
        if len(self._names) < MAX_LABELS:
            self._names.add(adapter.name)
        self._counter.labels(adapter.name if adapter.name in self._names else OTHER).inc()


def lora_requests_info(
    name: str, max_loras: int, running: Mapping[str, int], waiting: Mapping[str, int], now: float
) -> Metric:
    """The adapters in use as vLLM reports them: names in labels, and the time as the value."""
    labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
    info = GaugeMetricFamily(name, "Adapters of running and of waiting requests.", labels=labels)
    shown = [",".join(sorted(names)[:MAX_LABELS]) for names in (running, waiting)]
    info.add_metric([str(max_loras), *shown], now)
    return info
