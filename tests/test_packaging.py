"""What `pip install` brings: every module of the repository, and the bundled checkpoint."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGED = ("server/", "router/", "models/")


def tracked_files() -> set[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return set(listed.stdout.split())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of the tracked files, built from a copy so that the checkout stays clean."""
    tree = tmp_path_factory.mktemp("tree")
    for name in tracked_files():
        source = ROOT / name
        if source.is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes(source.read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(tree)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    return next(out.glob("vlmserve-*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_exactly_the_tracked_files_of_the_three_floors(wheel):
    expected = {f"vlmserve/{name}" for name in tracked_files() if name.startswith(PACKAGED)}
    expected |= {"vlmserve/__init__.py", "vlmserve/py.typed"}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("vlmserve/")}
        others = {name.split("/")[0] for name in archive.namelist()} - {"vlmserve"}
    assert packed == expected
    assert all(name.endswith(".dist-info") for name in others)


@pytest.mark.slow
def test_the_wheel_is_small_enough_to_ship_its_checkpoint(wheel):
    assert wheel.stat().st_size < 14 * 2**20
