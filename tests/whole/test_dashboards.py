"""The files of deploy/grafana and deploy/prometheus against a real Prometheus and a real server.

Needs prometheus and promtool (Debian: prometheus). That each metric they name exists is checked
without them.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml
from support.grafana_types import type_errors
from support.invariants import CHAT, body_for
from support.polling import wait_until
from support.running import faulty_serving, free_port

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "deploy/grafana/vlmserve.json"
RULES = ROOT / "deploy/prometheus/alerts.yml"
SCRAPES = ROOT / "deploy/prometheus/prometheus.yml"
POD_SCRAPES = ROOT / "deploy/prometheus/kubernetes.yml"
POD_SEARCH = "    kubernetes_sd_configs:\n      - role: pod\n"
RUNBOOK = ROOT / "docs/how-to/alerts.md"
needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="needs Prometheus: apt-get install prometheus",
)
# A scrape each second, so that a rate over five has points.
WINDOW = "5s"
# Queries without a value on a server with one engine, or before two scrapes with a difference.
WITHOUT_VALUES = re.compile(r"vlmserve_replica_")


def panels():
    return [one for one in json.loads(DASHBOARD.read_text())["panels"] if one["type"] != "row"]


def queries():
    """Each panel's queries, with Grafana's variables filled in."""
    variables = {"$__rate_interval": WINDOW, "$job": "vlmserve", "$instance": ".*"}
    for panel in panels():
        for target in panel["targets"]:
            query = target["expr"]
            for name, value in variables.items():
                query = query.replace(name, value)
            yield pytest.param(query, id=f"{panel['title']}-{target['refId']}")


def rule_expressions():
    # promtool reads YAML; a test needs only the expressions, which stand behind `expr:`.
    text = RULES.read_text()
    folded = re.findall(r"expr: >-\n((?: {10}.*\n)+)", text)
    return [*re.findall(r"expr: (?!>-)(.*)", text), *(" ".join(one.split()) for one in folded)]


def test_every_metric_of_the_files_stands_on_the_page_of_metrics():
    page = (ROOT / "docs/metrics.md").read_text()
    known = set(re.findall(r"`([a-z_]+)`", page))
    texts = [param.values[0] for param in queries()] + rule_expressions()
    names = {name for text in texts for name in re.findall(r"\b([a-z_]+)\{", text)}
    assert len(names) > 20
    for name in names:
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        assert {name, base} & known or name == "up", name


def test_each_alert_has_a_section_that_describes_what_to_do():
    alerts = re.findall(r"- alert: (\w+)", RULES.read_text())
    assert len(alerts) >= 8
    assert re.findall(r"(?m)^## (Vlmserve\w+)$", RUNBOOK.read_text()) == alerts
    for alert in alerts:
        assert f"runbook: docs/how-to/alerts.md#{alert.lower()}" in RULES.read_text()


def test_the_dashboard_loads_as_it_stands():
    """No id of another Grafana, unique ids, no panel over another, and every panel has queries."""
    dashboard = json.loads(DASHBOARD.read_text())
    assert "id" not in dashboard
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    taken = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    for panel in panels():
        assert panel["targets"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"


@pytest.mark.slow
def test_the_dashboard_has_the_types_that_grafana_publishes():
    assert type_errors(json.loads(DASHBOARD.read_text())) == []


@pytest.mark.slow
def test_what_grafana_does_not_know_is_found():
    dashboard = json.loads(DASHBOARD.read_text())
    dashboard["refersh"] = "10s"
    first, second = [panel for panel in dashboard["panels"] if panel["type"] == "timeseries"][:2]
    first["options"]["legend"]["placement"] = "below"
    first["fieldConfig"]["defaults"]["untis"] = "s"
    del second["targets"][0]["expr"]
    found = "\n".join(type_errors(dashboard))
    for name in ('"refersh"', '"below"', '"untis"', "'expr' is missing"):
        assert name in found


def promtool(*arguments):
    return subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
@needs_prometheus
def test_the_shipped_configurations_and_rules_are_valid(tmp_path):
    for arguments in (("check", "config", SCRAPES), ("check", "rules", RULES)):
        done = promtool(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    # Debian's build cannot look for pods: the rest of the file is checked.
    text = POD_SCRAPES.read_text()
    assert POD_SEARCH in text
    (tmp_path / "pods.yml").write_text(text.replace(POD_SEARCH, "    static_configs: []\n"))
    done = promtool("check", "config", tmp_path / "pods.yml")
    assert done.returncode == 0, done.stdout + done.stderr


RULES_TEST = """\
rule_files: [{rules}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - series: 'up{{job="vlmserve",instance="a"}}'
        values: '0x20'
      - series: >-
          vlmserve_restarts_total{{job="vlmserve",instance="a",process="engine",reason="hung"}}
        values: '0 0 0 1x20'
      - series: 'request_failure_total{{job="vlmserve",instance="a"}}'
        values: '0+10x20'
      - series: 'request_success_total{{job="vlmserve",instance="a"}}'
        values: '0+90x20'
    alert_rule_test:
      - eval_time: 15m
        alertname: VlmserveDown
        exp_alerts:
          - exp_labels: {{severity: critical, job: vlmserve, instance: a}}
            exp_annotations:
              summary: a does not answer its metrics.
              runbook: docs/how-to/alerts.md#vlmservedown
      - eval_time: 5m
        alertname: VlmserveRestarts
        exp_alerts:
          - exp_labels: {{severity: warning, instance: a, process: engine, reason: hung}}
            exp_annotations:
              summary: "a restarted a process: engine, hung."
              runbook: docs/how-to/alerts.md#vlmserverestarts
      - eval_time: 15m
        alertname: VlmserveRequestsFail
        exp_alerts:
          - exp_labels: {{severity: warning, instance: a}}
            exp_annotations:
              summary: a fails 10% of its requests.
              runbook: docs/how-to/alerts.md#vlmserverequestsfail
      - eval_time: 15m
        alertname: VlmserveRefusals
        exp_alerts: []
"""


@pytest.mark.slow
@needs_prometheus
def test_the_alerts_fire_on_what_they_are_for_and_only_then(tmp_path):
    test = tmp_path / "test.yml"
    test.write_text(RULES_TEST.format(rules=RULES))
    done = promtool("test", "rules", test)
    assert done.returncode == 0, done.stdout + done.stderr


class Prometheus:
    """A running Prometheus."""

    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path, **parameters):
        url = f"{self.url}{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=60) as response:
            return json.load(response)["data"]

    def values(self, query):
        return [float(one["value"][1]) for one in self.get("/api/v1/query", query=query)["result"]]

    def is_up(self):
        with contextlib.suppress(OSError):
            return self.values('min_over_time(up{job="vlmserve"}[30s])') == [1.0]
        return False


@contextlib.contextmanager
def scraping(folder, config):
    """A Prometheus with this configuration, which scrapes each second, until the block ends."""
    port = free_port()
    config = config.replace("15s", "1s").replace("alerts.yml", str(RULES))
    (folder / "prometheus.yml").write_text(config)
    command = [
        "prometheus", f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        yield Prometheus(port)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@pytest.fixture(scope="module")
def prometheus(server, tmp_path_factory):
    """A Prometheus that scrapes the server, after some answers about pictures."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = SCRAPES.read_text().replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
    with scraping(folder, config) as running:
        assert wait_until(running.is_up, 120), (folder / "log").read_text()
        yield running


def pod_targets(name, ports, address_of):
    """What Prometheus finds of a pod: one target for each of its container's ports."""
    for port in ports:
        labels = {
            "label_app": name,
            "container_port_name": port["name"],
            "container_port_number": str(port["containerPort"]),
            "name": f"{name}-1",
        }
        found = {f"__meta_kubernetes_pod_{key}": value for key, value in labels.items()}
        yield {"targets": [address_of[port["name"]]], "labels": found}


@pytest.mark.slow
@needs_prometheus
def test_pods_are_scraped_without_a_key_as_shipped(tmp_path):
    """Port 8000 was scraped, which answers 401 without a key."""
    pod = yaml.safe_load((ROOT / "deploy/kubernetes/deployment.yaml").read_text())["spec"]
    (container,) = pod["template"]["spec"]["containers"]
    port = free_port()
    with faulty_serving(tmp_path, server={"api_keys": ["k"]}, metrics_port=port) as server:
        addresses = {"http": f"127.0.0.1:{server.port}", "metrics": f"127.0.0.1:{port}"}
        groups = [
            *pod_targets("vlmserve", container["ports"], addresses),
            *pod_targets("another", container["ports"], addresses),
        ]
        search = f"    scrape_interval: 1s\n    static_configs: {json.dumps(groups)}\n"
        with scraping(tmp_path, POD_SCRAPES.read_text().replace(POD_SEARCH, search)) as running:
            assert wait_until(running.is_up, 120), (tmp_path / "log").read_text()
            (target,) = running.get("/api/v1/targets")["activeTargets"]
            assert target["discoveredLabels"]["__address__"] == addresses["metrics"]
            assert target["labels"]["pod"] == "vlmserve-1"
            assert running.values("num_requests_running") == [0.0]


def ask(server):
    body = json.dumps(body_for(CHAT)).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.url + CHAT, body, headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        response.read()


@pytest.mark.slow
@needs_prometheus
@pytest.mark.parametrize("query", list(queries()))
def test_a_query_of_the_dashboard_has_values_of_our_metrics(prometheus, server, query):
    def has_values():
        ask(server)
        return bool(prometheus.values(query))

    if WITHOUT_VALUES.search(query):
        assert prometheus.values(query) == []
    else:
        assert wait_until(has_values, 120)


@pytest.mark.slow
@needs_prometheus
def test_the_rules_are_evaluated_without_an_error_and_none_fires_on_a_healthy_server(prometheus):
    def rules():
        groups = prometheus.get("/api/v1/rules")["groups"]
        return [rule for group in groups for rule in group["rules"]]

    assert wait_until(lambda: all(rule["health"] == "ok" for rule in rules()), 60)
    assert len(rules()) == len(re.findall(r"- alert: ", RULES.read_text()))
    assert {rule["name"] for rule in rules() if rule["state"] == "firing"} == set()
