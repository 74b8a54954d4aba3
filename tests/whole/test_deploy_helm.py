"""deploy/helm: the chart renders what deploy/fleet has, and Kubernetes' own schemas accept it.

Rendered by Helm 4's own code, from the wheel that requirements/gateways/helm.txt pins.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from support.client_environments import gateway_python

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
CHART = DEPLOY / "helm" / "vlmserve"
VERSION = "1.37"
# Custom resources, of which there is no schema here.
CUSTOM = {"ScaledObject", "PodMonitor"}
RENDER = """\
import json, sys
import helm_python as helm

found = {"lint": helm.lint(sys.argv[1]), "renders": {}, "errors": {}}
with helm.Chart.load(sys.argv[1]) as chart:
    for name, values in json.load(sys.stdin).items():
        try:
            chart.validate_schema(values)
            found["renders"][name] = chart.render(values, name="prod", namespace="ai")
        except helm.HelmError as error:
            found["errors"][name] = str(error)
print(json.dumps(found))
"""
KEY = {"secret": {"apiKey": "k"}}
VALUES = {
    "usual": KEY,
    "own secret": {"secret": {"name": "mine"}},
    "hpa": KEY | {"autoscaling": {"type": "hpa"}},
    "keda": KEY | {"autoscaling": {"type": "keda"}},
    "shared": KEY | {"cache": {"shared": True, "storageClass": "files"}},
    "claim": KEY | {"cache": {"existingClaim": "weights"}},
    "bare": KEY
    | {
        "gpus": 0,
        "replicas": 1,
        "podDisruptionBudget": {"enabled": False},
        "networkPolicy": {"enabled": False},
        "metrics": {"annotations": False},
    },
    "full": KEY
    | {
        "args": ["--quantize", "int8"],
        "env": [{"name": "VLMSERVE_LOG_LEVEL", "value": "info"}],
        "gpus": 2,
        "startupMinutes": 5,
        "metrics": {"port": 9100, "podMonitor": True},
        "imagePullSecrets": [{"name": "registry"}],
        "nodeSelector": {"gpu": "h100"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "podAnnotations": {"team": "vision"},
    },
    "no key": {},
    "unknown": KEY | {"replcas": 3},
    "no scaler": KEY | {"autoscaling": {"type": "vpa"}},
}


def read(path):
    return yaml.safe_load(path.read_text())


@pytest.fixture(scope="module")
def found():
    done = subprocess.run(
        [gateway_python("helm"), "-c", RENDER, CHART],
        input=json.dumps(VALUES),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def manifests(found):
    """By the name of the values: the rendered objects by kind."""
    return {
        name: {
            one["kind"]: one
            for path, text in files.items()
            if path.endswith(".yaml")
            for one in yaml.safe_load_all(text)
            if one
        }
        for name, files in found["renders"].items()
    }


def pod_of(objects):
    return objects["Deployment"]["spec"]["template"]["spec"]


def without_owner(manifest):
    """A manifest's spec without names and labels of a release, as text."""
    text = json.dumps(manifest["spec"]).replace("prod-vlmserve", "vlmserve")
    return json.loads(text.replace(', "app.kubernetes.io/instance": "prod"', ""))


def test_the_usual_values_are_valid_and_each_one_is_used():
    values, schema = (
        read(CHART / "values.yaml"),
        json.loads((CHART / "values.schema.json").read_text()),
    )
    jsonschema.validate(values, schema)
    assert set(values) == set(schema["properties"]) - {"global"}
    templates = " ".join(path.read_text() for path in CHART.glob("templates/*"))
    used = set(re.findall(r"\.Values\.([\w.]+)", templates))
    for name, value in values.items():
        inner = value if isinstance(value, dict) and name != "resources" else {}
        names = {f"{name}.{key}" for key in inner} or {name}
        assert names <= used or name in used - {"secret"}, name


@pytest.mark.slow
def test_helm_finds_nothing_and_renders_all_but_wrong_values(found):
    assert found["lint"]["errors"] == []
    assert [one["error"] for one in found["lint"]["messages"]] == ["icon is recommended"]
    assert set(found["errors"]) == {"no key", "unknown", "no scaler"}
    assert "set secret.apiKey, or secret.name" in found["errors"]["no key"]
    assert "replcas" in found["errors"]["unknown"]


@pytest.mark.slow
def test_what_is_rendered_is_valid(manifests):
    kinds = {"Deployment", "Service", "Secret", "PodDisruptionBudget", "NetworkPolicy"}
    assert set(manifests["usual"]) == kinds
    assert set(manifests["bare"]) == {"Deployment", "Service", "Secret"}
    assert set(manifests["own secret"]) == kinds - {"Secret"}
    assert set(manifests["full"]) == kinds | {"PodMonitor"}
    for objects in manifests.values():
        for kind, manifest in objects.items():
            if kind not in CUSTOM:
                kubernetes_validate.validate(manifest, VERSION, strict=True)


@pytest.mark.slow
def test_the_chart_has_what_the_fleet_has(manifests):
    usual, fleet = copy.deepcopy(manifests["usual"]), DEPLOY / "fleet"
    ours, theirs = (
        pod_of(usual),
        pod_of({"Deployment": read(DEPLOY / "kubernetes/deployment.yaml")}),
    )
    patch = read(fleet / "deployment-patch.yaml")["spec"]
    (our_container,), (their_container,) = ours.pop("containers"), theirs.pop("containers")
    (added,) = patch["template"]["spec"]["containers"]
    assert {one["name"]: one for one in our_container.pop("env")}.keys() == {
        one["name"] for one in their_container.pop("env") + added["env"]
    }
    assert our_container.pop("lifecycle") == added["lifecycle"]
    for container in (our_container, their_container):
        container.pop("image"), container.pop("imagePullPolicy", None)
    assert our_container == their_container
    ours.pop("volumes"), theirs.pop("volumes"), ours.pop("topologySpreadConstraints")
    assert ours == theirs
    assert usual["Deployment"]["spec"]["replicas"] == patch["replicas"]
    strategy = {key: value for key, value in patch["strategy"].items() if key != "$patch"}
    assert usual["Deployment"]["spec"]["strategy"] == strategy
    for name, kind, values in (
        ("disruption-budget", "PodDisruptionBudget", "usual"),
        ("network-policy", "NetworkPolicy", "usual"),
        ("autoscaler", "HorizontalPodAutoscaler", "hpa"),
        ("scaled-object", "ScaledObject", "keda"),
    ):
        assert without_owner(manifests[values][kind]) == read(fleet / f"{name}.yaml")["spec"]


@pytest.mark.slow
def test_objects_find_each_other(manifests):
    for objects in manifests.values():
        deployment = objects["Deployment"]
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        selectors = [
            deployment["spec"]["selector"]["matchLabels"],
            objects["Service"]["spec"]["selector"],
        ]
        selectors += [
            objects[kind]["spec"][field]["matchLabels"]
            for kind, field in (
                ("PodDisruptionBudget", "selector"),
                ("NetworkPolicy", "podSelector"),
                ("PodMonitor", "selector"),
            )
            if kind in objects
        ]
        for selector in selectors:
            assert selector == {"app": "vlmserve", "app.kubernetes.io/instance": "prod"}
            assert selector.items() <= labels.items()
        for kind in ("HorizontalPodAutoscaler", "ScaledObject"):
            if kind in objects:
                target = objects[kind]["spec"]["scaleTargetRef"]
                assert target["name"] == deployment["metadata"]["name"]
                assert "replicas" not in deployment["spec"], "an upgrade would undo the scaler's"


@pytest.mark.slow
def test_values_reach_the_pod(manifests):
    full = pod_of(manifests["full"])
    (container,) = full["containers"]
    assert container["args"][1:] == ["--quantize", "int8"]
    assert container["resources"]["limits"] == {"memory": "48Gi", "nvidia.com/gpu": 2}
    assert container["startupProbe"]["failureThreshold"] == 30
    assert {port["name"]: port["containerPort"] for port in container["ports"]}["metrics"] == 9100
    assert full["nodeSelector"] == {"gpu": "h100"}
    annotations = manifests["full"]["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == "9100"
    assert annotations["team"] == "vision"
    (bare,) = pod_of(manifests["bare"])["containers"]
    assert "nvidia.com/gpu" not in bare["resources"]["limits"]
    (mine,) = pod_of(manifests["own secret"])["containers"]
    secrets = [one["valueFrom"]["secretKeyRef"]["name"] for one in mine["env"][:2]]
    assert secrets == ["mine", "mine"]


@pytest.mark.slow
def test_weights_lie_in_a_volume_of_each_pod_in_a_shared_or_in_an_existing_one(manifests):
    volumes = {name: pod_of(objects)["volumes"][0] for name, objects in manifests.items()}
    assert "ephemeral" in volumes["usual"]
    assert volumes["claim"]["persistentVolumeClaim"]["claimName"] == "weights"
    assert "PersistentVolumeClaim" not in manifests["claim"]
    claim = manifests["shared"]["PersistentVolumeClaim"]
    assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claim["spec"]["storageClassName"] == "files"
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
