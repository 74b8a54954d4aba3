"""Lets a bare interpreter import the project and what it lacks: links and unpacked wheels.

Owns which packages are looked for and where they come from. Installs nothing into the interpreter.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# what models/ and the scheduler import beside torch, transformers, accelerate and triton
NEEDED = ("msgspec", "llguidance")
# and what the tests do
FOR_TESTS = ("pytest", "PIL")
# wheels whose package is called otherwise
_PACKAGES = {"pillow": "PIL"}


def lay_out(folder: Path, wheels: Path | None) -> dict[str, str]:
    """The environment of a child that can import the project; `folder` must outlive it.

    wheels: a folder of wheels for this interpreter, of which those are unpacked that it lacks.
    """
    path = folder / "path"
    path.mkdir()
    (path / "vlmserve").symlink_to(ROOT, target_is_directory=True)
    if wheels is not None:
        for wheel in lacking(sorted(wheels.glob("*.whl"))):
            # a wheel is an archive of what belongs on the path; ours bring no more than that
            shutil.unpack_archive(wheel, path, "zip")
    before = os.environ.get("PYTHONPATH")
    return dict(os.environ, PYTHONPATH=os.pathsep.join([str(path), *([before] if before else [])]))


def lacking(wheels: Iterable[Path]) -> list[Path]:
    """Those whose package this interpreter does not have."""
    names = ((wheel, wheel.name.split("-")[0].lower()) for wheel in wheels)
    return [wheel for wheel, name in names if not _is_there(_PACKAGES.get(name, name))]


def missing(packages: Iterable[str], path: str) -> list[str]:
    """Those that neither this interpreter nor a child with that PYTHONPATH has."""
    folders = [Path(one) for one in path.split(os.pathsep) if one]
    return [
        name
        for name in packages
        if not _is_there(name) and not any((folder / name).exists() for folder in folders)
    ]


def _is_there(package: str) -> bool:
    return find_spec(package) is not None
