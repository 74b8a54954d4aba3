"""docs/metrics.md against the program: the name, kind and labels of every metric."""

import re
from pathlib import Path

from vlmserve.models.batch import AdapterRef
from vlmserve.router.client.replica_pool import ReplicaState
from vlmserve.router.messages import EngineStats
from vlmserve.server.telemetry.engine_metrics import RestartMetrics
from vlmserve.server.telemetry.metrics import Metrics

PAGE = Path(__file__).resolve().parents[3] / "docs" / "metrics.md"
BUCKETS = {"le"}


def rows_of_page():
    """name -> (kind, labels) of each table row, and the names in order."""
    names, rows = [], {}
    for line in PAGE.read_text("utf-8").splitlines():
        found = re.fullmatch(r"\| `(\w+)` \| (\w+) \| (.*?)\| (\S.*) \|", line)
        if found:
            name, kind, labels, _ = found.groups()
            names.append(name)
            rows[name] = (kind, frozenset(re.findall(r"`(\w+)`", labels)))
    return names, rows


def rows_of_program(folder):
    metrics = Metrics(num_request_max=1)
    metrics.watch_replicas(lambda: [ReplicaState(is_ready=True, stats=EngineStats())])
    metrics.http_requests.labels("GET", "/", "200")  # has no series before its first count
    metrics.adapters.count(AdapterRef("a", "/a", "digest"))
    found = {}
    for family in [*metrics.registry.collect(), *RestartMetrics(folder).collect()]:
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - BUCKETS
        found[name] = (family.type, frozenset(labels))
    return found


def test_the_page_has_every_metric_with_its_kind_and_labels_and_no_other(tmp_path):
    names, rows = rows_of_page()
    assert len(names) == len(set(names)), "a metric stands twice on the page"
    assert rows == rows_of_program(tmp_path)
