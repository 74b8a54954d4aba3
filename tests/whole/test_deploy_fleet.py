"""deploy/fleet: several servers in Kubernetes, checked against Kubernetes' own schemas."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from vlmserve.router.messages import EngineStats
from vlmserve.server.telemetry.metrics import Metrics

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
FLEET, SINGLE = DEPLOY / "fleet", DEPLOY / "kubernetes"
VERSION = "1.37"
# Of a custom resource there is no schema here; a patch is no whole resource.
NO_SCHEMA = {"scaled-object.yaml", "deployment-patch.yaml", "kustomization.yaml"}
MANIFESTS = [*sorted(SINGLE.glob("*.yaml")), *sorted(FLEET.glob("*.yaml"))]


def read(path: Path):
    return yaml.safe_load(path.read_text())


@pytest.fixture(scope="module")
def deployment():
    return read(SINGLE / "deployment.yaml")


@pytest.mark.parametrize(
    "path", [one for one in MANIFESTS if one.name not in NO_SCHEMA], ids=lambda path: path.name
)
def test_manifests_are_valid(path):
    kubernetes_validate.validate(read(path), VERSION, strict=True)


def test_each_file_is_in_the_kustomization_or_applied_by_hand():
    kustomization = read(FLEET / "kustomization.yaml")
    named = {*kustomization["resources"], *(p.get("path") for p in kustomization["patches"])}
    by_hand = {"autoscaler.yaml", "scaled-object.yaml", "kustomization.yaml"}
    files = {path.name for path in FLEET.glob("*.yaml")}
    assert files == {name for name in named if name and name.endswith(".yaml")} | by_hand
    for name in by_hand - {"kustomization.yaml"}:
        assert f"kubectl apply -f {name}" in (FLEET / name).read_text()


def test_budget_policy_and_scalers_find_the_pods(deployment):
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for name, field in (("disruption-budget", "selector"), ("network-policy", "podSelector")):
        selector = read(FLEET / f"{name}.yaml")["spec"][field]["matchLabels"]
        assert selector.items() <= labels.items()
    for name in ("autoscaler", "scaled-object"):
        target = read(FLEET / f"{name}.yaml")["spec"]["scaleTargetRef"]
        assert target["name"] == deployment["metadata"]["name"]


def test_the_policy_opens_the_pods_ports_and_metrics_to_scrapers_only(deployment):
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    ports = {port["name"] for port in container["ports"]}
    rules = read(FLEET / "network-policy.yaml")["spec"]["ingress"]
    opened = {port["port"]: "from" in rule for rule in rules for port in rule["ports"]}
    assert opened == {"http": False, "metrics": True}
    assert set(opened) == ports


def test_scalers_read_metrics_that_there_are():
    names = set(re.findall(r"^# TYPE (\w+)", Metrics(1).render(EngineStats()).decode(), re.M))
    (metric,) = read(FLEET / "autoscaler.yaml")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in names
    (trigger,) = read(FLEET / "scaled-object.yaml")["spec"]["triggers"]
    asked = re.findall(r"(\w+)\{", trigger["metadata"]["query"])
    assert len(asked) == 2
    assert set(asked) <= names


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kubectl_builds_a_fleet_whose_pods_share_no_cache(tmp_path):
    for folder in (FLEET, SINGLE):
        shutil.copytree(folder, tmp_path / folder.name)
    (tmp_path / SINGLE.name / "secret.env").write_text("HF_TOKEN=a\nVLMSERVE_API_KEY=b\n")
    done = subprocess.run(
        ["kubectl", "kustomize", str(tmp_path / FLEET.name)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    built = {one["kind"]: one for one in yaml.safe_load_all(done.stdout)}
    for manifest in built.values():
        kubernetes_validate.validate(manifest, VERSION, strict=True)
    assert "PersistentVolumeClaim" not in built
    spec = built["Deployment"]["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    (cache,) = [v for v in spec["template"]["spec"]["volumes"] if v["name"] == "cache"]
    assert set(cache) == {"name", "ephemeral"}
