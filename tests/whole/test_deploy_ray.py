"""deploy/ray/kuberay.yaml: pods by Kubernetes' own schemas, and what its parts must agree in.

The whole resource was checked by hand against the schema of KubeRay 1.7, unknown fields refused.
"""

import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from support.containers import read_dockerfile

from vlmserve.models.settings.option_parser import declarations
from vlmserve.server.settings import ServerSettings

ROOT = Path(__file__).resolve().parents[2]
VERSION = "1.37"


def read(path):
    return yaml.safe_load((ROOT / path).read_text())


@pytest.fixture(scope="module")
def spec():
    service = read("deploy/ray/kuberay.yaml")
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    return service["spec"]


@pytest.fixture(scope="module")
def cluster(spec):
    return spec["rayClusterConfig"]


@pytest.fixture(scope="module")
def head(cluster):
    return cluster["headGroupSpec"]


@pytest.fixture(scope="module")
def workers(cluster):
    (group,) = cluster["workerGroupSpecs"]
    return group


def container_of(group):
    (container,) = group["template"]["spec"]["containers"]
    return container


def test_its_pods_are_valid(head, workers):
    for group in (head, workers):
        metadata = {"name": "vlmserve"} | group["template"]["metadata"]
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata}
        pod["spec"] = group["template"]["spec"]
        kubernetes_validate.validate(pod, VERSION, strict=True)


def test_its_application_is_that_of_the_file_for_serve_deploy(spec):
    """But for the keys, which come from a secret there."""
    given, expected = yaml.safe_load(spec["serveConfigV2"]), read("deploy/ray/vlmserve.yaml")
    del expected["applications"][0]["args"]["options"]["api_key_file"]
    assert given == expected


def test_a_worker_has_room_for_one_engine_and_the_group_for_all_and_an_update(spec, workers):
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    args, resources = application["args"], container_of(workers)["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == args["gpus"]
    assert int(resources["requests"]["cpu"]) == args["cpus"]
    assert int(workers["rayStartParams"]["num-cpus"]) == args["cpus"]
    assert workers["minReplicas"] == args["replicas"]
    assert workers["maxReplicas"] == args["max_replicas"] + 1


def test_no_engine_runs_on_the_head_and_both_have_the_keys(head, workers):
    assert {head["rayStartParams"][name] for name in ("num-cpus", "num-gpus")} == {"0"}
    names = {"HF_TOKEN", "VLMSERVE_API_KEY", "RAY_USAGE_STATS_ENABLED", "RAY_worker_niceness"}
    for group in (head, workers):
        assert {one["name"] for one in container_of(group)["env"]} == names
        assert group["template"]["spec"]["securityContext"]["runAsUser"] == 1000


def test_pods_that_are_removed_have_the_time_of_the_longest_request(workers):
    (longest,) = (
        one.default for one in declarations(ServerSettings) if one.parameter == "max_request_time"
    )
    assert workers["template"]["spec"]["terminationGracePeriodSeconds"] > longest


def test_the_image_has_the_ray_that_the_resource_names(cluster, head, workers):
    pins = (ROOT / "requirements" / "ray" / "newest.txt").read_text()
    assert re.search(r"(?m)^ray==(.*)$", pins)[1] == cluster["rayVersion"]
    tag = container_of(head)["image"]
    assert tag == container_of(workers)["image"]
    command = f"docker build -t {tag} --build-arg EXTRA=ray ."
    assert command in (ROOT / "deploy/ray/kuberay.yaml").read_text()
    build, image = read_dockerfile(ROOT / "Dockerfile")
    assert "EXTRA" in build.settings("ARG")
    assert "EXTRA" in image.settings("ARG")
    assert any("'.[ray]'" in run.value for run in build.all("RUN"))
    # KubeRay's probes.
    assert any("wget" in run.value for run in image.all("RUN"))
