"""Makes the project and missing packages importable for a bare interpreter: links and wheels.

Owns which packages are needed and where they come from. Installs nothing into the interpreter.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# imported by models/ and the scheduler, beside torch, transformers, accelerate and triton
NEEDED = ("msgspec", "llguidance")
FOR_TESTS = ("pytest", "PIL")
# packages with another name than their wheel
_PACKAGES = {"pillow": "PIL"}


def lay_out(folder: Path, wheels: Path | None) -> dict[str, str]:
    """The environment of a child that can import the project; `folder` must outlive it.

    wheels: a folder of wheels for this interpreter; only missing packages are unpacked.
    """
    path = folder / "path"
    path.mkdir()
    (path / "vlmserve").symlink_to(ROOT, target_is_directory=True)
    for wheel in sorted(wheels.glob("*.whl")) if wheels else ():
        name = wheel.name.split("-")[0].lower()
        if find_spec(_PACKAGES.get(name, name)) is None:
            # a wheel is an archive of files for the path; these wheels need no other step
            shutil.unpack_archive(wheel, path, "zip")
    paths = [str(path), *filter(None, [os.environ.get("PYTHONPATH")])]
    return dict(os.environ, PYTHONPATH=os.pathsep.join(paths))


def missing(packages: Iterable[str], path: str) -> list[str]:
    """The packages that neither this interpreter nor a child with that PYTHONPATH has."""
    folders = [Path(one) for one in path.split(os.pathsep) if one]
    lacking = (name for name in packages if find_spec(name) is None)
    return [name for name in lacking if not any((folder / name).exists() for folder in folders)]
