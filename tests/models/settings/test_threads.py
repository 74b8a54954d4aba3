"""How the engine's threads wait: they spin a moment, then sleep, unless the user said otherwise."""

import os
import subprocess
import sys

import pytest

from vlmserve.models.malloc import use_growing_segments
from vlmserve.models.settings.threads import wait_briefly


def test_threads_spin_a_moment_where_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that what is set below is taken back
        monkeypatch.delenv(name)
    wait_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == "20000"
    assert "OMP_WAIT_POLICY" not in os.environ


@pytest.mark.parametrize(
    ("name", "value"), [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "2000")]
)
def test_the_users_word_stands(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    for other in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    before = dict(os.environ)
    wait_briefly()
    assert dict(os.environ) == before


def test_the_engines_process_can_still_say_it_before_torch_comes() -> None:
    script = "import vlmserve.router.engine.process, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


GPU_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.mark.parametrize("given", [None, *GPU_SETTINGS])
def test_segments_grow_on_a_gpu_unless_the_user_set_the_allocator(
    monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    for name in GPU_SETTINGS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    if given is not None:
        monkeypatch.setenv(given, "max_split_size_mb:64")
    use_growing_segments()
    found = {name: os.environ[name] for name in GPU_SETTINGS if name in os.environ}
    assert found == (
        {given: "max_split_size_mb:64"}
        if given
        else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    )
