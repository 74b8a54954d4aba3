"""The container files: what they name is what the server has."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from compose_spec import PyOptions
from support.containers import health_command, is_ignored, read_dockerfile

from vlmserve.server.routes.health import LIVE, READY

ROOT = Path(__file__).resolve().parents[2]
IGNORE_FILE = ROOT / ".dockerignore"
KUBERNETES = ROOT / "deploy" / "kubernetes"
PORT = 8000
UID = 1000
CACHE = "/cache"
MANIFESTS = ("cache.yaml", "deployment.yaml", "service.yaml")


@pytest.fixture(scope="module")
def image():
    """The Dockerfile's last stage."""
    return read_dockerfile(ROOT / "Dockerfile")[-1]


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((ROOT / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def manifests():
    return {name: yaml.safe_load((KUBERNETES / name).read_text()) for name in MANIFESTS}


@pytest.fixture(scope="module")
def pod(manifests):
    return manifests["deployment.yaml"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod):
    (only,) = pod["containers"]
    return only


def help_of_serve():
    done = subprocess.run(
        [sys.executable, "-m", "vlmserve.server", "serve", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "160", "NO_COLOR": "1"},
    )
    return done.stdout


def test_the_image_runs_the_command_line_as_it_is(image):
    words = image.last("ENTRYPOINT").words
    assert words[:2] == ["vlmserve", "serve"]
    options = [word for word in words if word.startswith("--")]
    assert options
    text = help_of_serve()
    for option in options:
        assert f"{option} " in text
    assert words[words.index("--host") + 1] == "0.0.0.0"
    assert words[words.index("--port") + 1] == image.last("EXPOSE").value == str(PORT)


def test_the_image_is_slim_and_its_user_is_not_root(image):
    assert image.base.split(":")[1].startswith("3.11-slim")
    assert image.last("USER").value == str(UID)
    runs = " ".join(run.value for run in image.all("RUN"))
    assert f"--uid {UID}" in runs
    assert "pip install" not in runs, "what only the build needs belongs into the build stage"


def test_the_image_asks_a_route_that_there_is_for_its_health(image):
    (command,) = [word for word in health_command(image) if "http://" in word]
    assert f"http://127.0.0.1:{PORT}{READY}" in command


def test_weights_are_cached_in_the_volume_that_its_user_may_write(image):
    assert image.last("VOLUME").value == CACHE == image.settings("ENV")["HF_HOME"]
    assert any(f"install -d -o vlmserve {CACHE}" in run.value for run in image.all("RUN"))


def test_everything_is_installed_in_the_environment_that_is_on_the_path(image):
    build = read_dockerfile(ROOT / "Dockerfile")[0]
    assert build.base == image.base
    (copied,) = [copy.value for copy in image.all("COPY")]
    assert copied == f"--from={build.name} /opt/vlmserve /opt/vlmserve"
    for stage in (build, image):
        assert stage.settings("ENV")["PATH"].startswith("/opt/vlmserve/bin:")


def tracked_files():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return listed.stdout.split()


def test_the_build_context_holds_what_the_wheel_needs_and_nothing_else():
    kept = {name for name in tracked_files() if not is_ignored(name, IGNORE_FILE)}
    tops = {name.split("/")[0] for name in kept}
    packages = {"server", "router", "models", "requirements", "__init__.py", "py.typed"}
    metadata = {"setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md"}
    assert tops == packages | metadata | {"LICENSE", "CHANGELOG.md"}
    whole = {name for name in tracked_files() if name.startswith(("server/", "router/", "models/"))}
    assert whole <= kept


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (".git/config", True),
        (".venv/bin/python", True),
        ("server/__pycache__/a.pyc", True),
        ("bench/serve.py", True),
        ("server/bench/load.py", False),
        ("models/bundled/checkpoint/model.safetensors", False),
        ("deploy/kubernetes/secret.env", True),
    ],
)
def test_the_ignore_file_is_read_as_docker_reads_it(name, expected):
    assert is_ignored(name, IGNORE_FILE) is expected


def test_compose_is_valid():
    """By a strict parser of the Compose Specification, with the variables' default values."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (ROOT / "compose.yaml").read_text())
    parse = PyOptions(apply_merge=True).from_yaml
    parsed = parse(text)
    parsed.validate()
    assert set(parsed.service_names()) == {"vlmserve", "vlmserve-cpu"}
    with pytest.raises(ValueError, match="imge"):
        parse(text.replace("image:", "imge:"))


def test_compose_serves_on_a_gpu_and_by_profile_on_the_cpu(compose, image):
    gpu, cpu = compose["services"]["vlmserve"], compose["services"]["vlmserve-cpu"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert "profiles" not in gpu
    assert cpu["profiles"] == ["cpu"]
    assert "deploy" not in cpu
    arguments = set(cpu["build"]["args"])
    assert arguments <= set(read_dockerfile(ROOT / "Dockerfile")[0].settings("ARG"))
    for service in (gpu, cpu):
        assert service["volumes"] == [f"cache:{CACHE}"]
        (port,) = service["ports"]
        assert port.startswith("127.0.0.1:"), "no key is needed, so no neighbour may reach it"
        assert port.endswith(f":{PORT}")
        assert service["read_only"]
        assert service["tmpfs"] == ["/tmp"]
        assert service["cap_drop"] == ["ALL"]
        assert service["shm_size"] == "1gb", "NCCL needs more than Docker's 64 MB"
    assert set(compose["volumes"]) == {"cache"}


def test_every_variable_of_compose_and_kubernetes_is_one_that_is_read(compose, container):
    known = (ROOT / "docs" / "settings.md").read_text()  # tests hold it to the options
    names = set(compose["services"]["vlmserve"]["environment"])
    names |= {variable["name"] for variable in container["env"]}
    options = {"VLMSERVE_API_KEY", "VLMSERVE_METRICS_PORT", "VLMSERVE_MODEL"}
    assert names == options | {"HF_TOKEN"}
    for name in names - {"HF_TOKEN"}:
        assert f"`{name}`" in known


@pytest.mark.slow
def test_an_empty_variable_is_as_good_as_none(start_server, monkeypatch):
    """Compose passes empty ones where the operator set nothing."""
    for name in ("HF_TOKEN", "VLMSERVE_API_KEY", "VLMSERVE_MODEL"):
        monkeypatch.setenv(name, "")
    server = start_server("--dtype", "float32")
    assert b"vlmserve-tiny-vision" in server.get("/v1/models")


def test_the_model_may_come_from_the_environment():
    done = subprocess.run(
        [sys.executable, "-m", "vlmserve.server", "serve", "--port", "0"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "VLMSERVE_MODEL": "./no-such-folder"},
    )
    assert done.returncode == 1
    assert done.stderr.startswith("vlmserve: no model at './no-such-folder'")


def test_probes_ask_routes_that_there_are_on_a_port_that_is_open(container):
    port = container["ports"][0]
    assert port["containerPort"] == PORT
    paths = {}
    for kind in ("startup", "readiness", "liveness"):
        probe = container[f"{kind}Probe"]["httpGet"]
        assert probe["port"] == port["name"]
        paths[kind] = probe["path"]
    assert paths == {"startup": READY, "readiness": READY, "liveness": LIVE}


def test_scrapers_find_the_port_that_needs_no_key(manifests, container):
    template = manifests["deployment.yaml"]["spec"]["template"]
    (value,) = [v["value"] for v in container["env"] if v["name"] == "VLMSERVE_METRICS_PORT"]
    named = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert template["metadata"]["annotations"]["prometheus.io/port"] == value
    assert named["metrics"] == int(value)
    ports = manifests["service.yaml"]["spec"]["ports"]
    assert [port["targetPort"] for port in ports] == ["http"], "metrics stay inside the cluster"


def test_the_startup_probe_waits_for_a_download_and_liveness_outlasts_a_pause(container):
    startup, liveness = container["startupProbe"], container["livenessProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1800
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 30


def test_the_pod_is_not_root_and_writes_only_to_its_volumes(pod, container):
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == UID
    context = container["securityContext"]
    assert context["readOnlyRootFilesystem"]
    assert not context["allowPrivilegeEscalation"]
    assert context["capabilities"]["drop"] == ["ALL"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"cache": CACHE, "tmp": "/tmp", "shm": "/dev/shm"}
    (shared,) = [volume for volume in pod["volumes"] if volume["name"] == "shm"]
    assert shared["emptyDir"]["medium"] == "Memory", "NCCL needs more than the usual 64 MB"
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts)


def test_the_pod_has_one_gpu_and_time_to_end_its_answers(manifests, pod, container):
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert manifests["deployment.yaml"]["spec"]["strategy"] == {"type": "Recreate"}
    assert pod["terminationGracePeriodSeconds"] > 30


def test_manifests_name_each_other_rightly(manifests, pod, container):
    deployment, service = manifests["deployment.yaml"], manifests["service.yaml"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    (claim,) = [v for v in pod["volumes"] if "persistentVolumeClaim" in v]
    assert (
        claim["persistentVolumeClaim"]["claimName"] == manifests["cache.yaml"]["metadata"]["name"]
    )


def test_secrets_come_from_a_file_that_the_repository_does_not_hold(container):
    kustomization = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
    assert sorted(kustomization["resources"]) == sorted(MANIFESTS)
    (secret,) = kustomization["secretGenerator"]
    assert secret["envs"] == ["secret.env"]
    example = (KUBERNETES / "secret.env.example").read_text().splitlines()
    keys = {line.partition("=")[0] for line in example if not line.startswith("#")}
    references = [
        variable["valueFrom"]["secretKeyRef"]
        for variable in container["env"]
        if "valueFrom" in variable
    ]
    assert {reference["key"] for reference in references} == keys
    assert {reference["name"] for reference in references} == {secret["name"]}
    assert "deploy/kubernetes/secret.env" in (ROOT / ".gitignore").read_text().splitlines()
    (image,) = kustomization["images"]
    assert image["name"] == container["image"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kubectl_builds_the_manifests(tmp_path):
    folder = shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    (folder / "secret.env").write_text("HF_TOKEN=a\nVLMSERVE_API_KEY=b\n")
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    kinds = {one["kind"]: one for one in built}
    assert set(kinds) == {"Deployment", "Service", "Secret", "PersistentVolumeClaim"}
    (built_container,) = kinds["Deployment"]["spec"]["template"]["spec"]["containers"]
    secret = built_container["env"][0]["valueFrom"]["secretKeyRef"]["name"]
    assert secret == kinds["Secret"]["metadata"]["name"]


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint_finds_nothing():
    done = subprocess.run(
        ["hadolint", str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout
