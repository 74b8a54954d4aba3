"""One text of metrics from those of all replicas, as the engines of `--replicas` report one.

Counters, histograms and gauges are added up, shares averaged, moments and descriptions taken from
the replica with the largest value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

Key = tuple[str, tuple[tuple[str, str], ...]]


def sum_of_metrics(texts: Sequence[str]) -> bytes:
    """The metrics of several servers in Prometheus' text format. Raises ValueError if one has none.

    A metric that only some servers have is the sum over those.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Sums(texts))
    return generate_latest(registry)


class _Sums(Collector):
    def __init__(self, texts: Sequence[str]) -> None:
        self._families: dict[str, list[Metric]] = {}
        for text in texts:
            for family in text_string_to_metric_families(text):
                self._families.setdefault(family.name, []).append(family)

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        for name, families in self._families.items():
            merged = Metric(name, families[0].documentation, families[0].type)
            merged.samples = _merged(name, families)
            yield merged


def _merged(name: str, families: Sequence[Metric]) -> list[Sample]:
    values: dict[Key, list[Sample]] = {}
    for family in families:
        for sample in family.samples:
            values.setdefault((sample.name, tuple(sample.labels.items())), []).append(sample)
    return [
        Sample(samples[0].name, samples[0].labels, _value(name, [one.value for one in samples]))
        for samples in values.values()
    ]


def _value(name: str, values: Sequence[float]) -> float:
    if name.endswith(("_perc", "_ratio")):
        return sum(values) / len(values)
    if name.endswith(("_timestamp", "_info", "_start_time_seconds", "_lag_seconds")):
        return max(values)
    return sum(values)
