"""The Dockerfile's own steps, taken without docker: what they install serves.

Each RUN of the build stage runs as written, in a copy of the build context as .dockerignore leaves
it, with /opt/vlmserve and /src moved to a temporary folder. Then the ENTRYPOINT runs, and the
HEALTHCHECK. What stays unverified is docker itself: base image, layers and users.
"""

import base64
import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.containers import Stage, health_command, is_ignored, read_dockerfile

ROOT = Path(__file__).resolve().parents[2]
STEP_TIMEOUT_S = 1500
START_TIMEOUT_S = 180
# Downloads of earlier runs may be taken again: only the image must not keep them.
NOT_TAKEN_OVER = {"PIP_NO_CACHE_DIR"}


@dataclass
class Image:
    """Where the steps put things, and the environment in which its commands run."""

    folder: Path
    stage: Stage
    environment: dict[str, str]

    def moved(self, text: str) -> str:
        """The text with the image's folders where they lie here."""
        for name in ("/opt/vlmserve", "/src", "/cache"):
            text = text.replace(name, str(self.folder / name[1:]))
        return text


def environment_of(stages, folder):
    """What ENV and ARG set, over the little that the base image has; nothing of this checkout."""
    pairs = {}
    for stage in stages:
        pairs |= stage.settings("ARG") | stage.settings("ENV")
    path = f"{folder}/opt/vlmserve/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
    settings = {name: value for name, value in pairs.items() if name not in NOT_TAKEN_OVER}
    own = {"PATH": path, "HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
    own |= {"HF_HOME": str(folder / "cache"), "XDG_CACHE_HOME": os.path.expanduser("~/.cache")}
    index = os.environ.get("TORCH_INDEX_URL", "")
    return kept | settings | own | {"TORCH_INDEX_URL": index, "OMP_NUM_THREADS": "1"}


def copy_context(folder):
    """The tracked files that .dockerignore lets through."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():
        source = ROOT / name
        if source.is_file() and not is_ignored(name, ROOT / ".dockerignore"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(source.read_bytes())


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image")
    for name in ("src", "home", "tmp", "cache", "opt"):
        (folder / name).mkdir()
    copy_context(folder / "src")
    stages = read_dockerfile(ROOT / "Dockerfile")
    built = Image(folder, stages[-1], environment_of(stages, folder))
    for step in stages[0].all("RUN"):
        subprocess.run(
            ["/bin/sh", "-c", built.moved(step.value)],
            cwd=folder / "src",
            env=built.environment,
            check=True,
            timeout=STEP_TIMEOUT_S,
        )
    return built


@contextlib.contextmanager
def running(image, port, log):
    """The ENTRYPOINT on a port of the loopback, from an empty folder, until the block ends."""
    moved = {"0.0.0.0": "127.0.0.1", "8000": str(port)}
    words = [moved.get(word, word) for word in image.stage.last("ENTRYPOINT").words]
    with log.open("wb") as err:
        process = subprocess.Popen(
            [str(image.folder / "opt/vlmserve/bin" / words[0]), *words[1:], "--dtype", "float32"],
            cwd=image.folder / "home",
            env=image.environment,
            stdout=err,
            stderr=err,
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


def is_healthy(image, port):
    command = [word.replace(":8000/", f":{port}/") for word in health_command(image.stage)]
    done = subprocess.run(command, env=image.environment, capture_output=True, timeout=60)
    return done.returncode == 0


def ask(port, picture, question):
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": question},
    ]
    body = {
        "model": "vlmserve-tiny-vision",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["choices"][0]["message"]["content"]


@pytest.mark.slow
def test_the_image_s_install_steps_make_a_server_that_is_healthy_and_answers(
    image, tmp_path, wait_for, unused_port
):
    log = tmp_path / "log"
    assert not is_healthy(image, unused_port), "the check must fail where nobody serves"
    with running(image, unused_port, log) as process:
        healthy = wait_for(
            lambda: process.poll() is not None or is_healthy(image, unused_port), START_TIMEOUT_S
        )
        assert healthy, log.read_text()
        assert process.poll() is None, log.read_text()
        answer = ask(unused_port, ROOT / "examples" / "shapes.png", "What is in this image?")
    assert "red circle" in answer
    assert "blue triangle" in answer
    assert process.returncode == 0


@pytest.mark.slow
def test_the_image_holds_a_package_of_its_own_and_what_quantizes(image):
    code = "import bitsandbytes, vlmserve; print(vlmserve.__file__)"
    done = subprocess.run(
        [str(image.folder / "opt/vlmserve/bin/python"), "-c", code],
        cwd=image.folder / "home",
        env=image.environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(image.folder / "opt/vlmserve/lib"))
