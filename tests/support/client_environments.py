"""Virtual environments of the clients and the quantizers that the server is tested with.

Owns where they lie and when they are made anew: one for each file of
`requirements/clients/` and `requirements/quantizers/`, under `build/`, kept
while its pins and this Python stay the same. Knows nothing of what is run in
them.
"""

import hashlib
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PINS = ROOT / "requirements" / "clients"
FOLDER = ROOT / "build" / "clients"
QUANTIZER_PINS = ROOT / "requirements" / "quantizers"
QUANTIZER_FOLDER = ROOT / "build" / "quantizers"
CHECKS = ROOT / "tests" / "clients"
INSTALL_TIMEOUT_S = 900
CHECKS_TIMEOUT_S = 600


def client_python(name: str) -> Path:
    """The interpreter of the environment that `requirements/clients/<name>.txt` pins."""
    return _python(PINS / f"{name}.txt", FOLDER / name)


def quantizer_python(name: str) -> Path:
    """The same of `requirements/quantizers/<name>.txt`, with torch from this environment.

    What is pinned there comes before this environment's packages.
    """
    shared = Path(find_spec("torch").origin).parents[1]
    return _python(QUANTIZER_PINS / f"{name}.txt", QUANTIZER_FOLDER / name, shared)


def _python(pins: Path, folder: Path, shared: Path | None = None) -> Path:
    python, mark = folder / "bin" / "python", folder / "made-of"
    made_of = hashlib.sha256(f"{sys.version}{shared}".encode() + pins.read_bytes()).hexdigest()
    if not mark.exists() or mark.read_text() != made_of:
        venv = [sys.executable, "-m", "venv", "--clear", str(folder)]
        subprocess.run(venv, check=True, timeout=INSTALL_TIMEOUT_S)
        install = [python, "-m", "pip", "install", "-qq", "--no-deps", "-r", pins]
        subprocess.run(install, check=True, timeout=INSTALL_TIMEOUT_S)
        if shared is not None:
            site = next(folder.glob("lib/python*/site-packages"))
            (site / "shared.pth").write_text(f"{shared}\n")
        # Last, so that an environment that was cut in the making is made again.
        mark.write_text(made_of)
    return python


def checks_command(python: str | Path, file: str) -> list[str]:
    """The command that runs a file of `tests/clients/` with that environment's pytest."""
    options = ["-q", "-c", CHECKS / "pytest.ini", "--confcutdir", CHECKS]
    return [str(part) for part in (python, "-m", "pytest", *options, CHECKS / file)]


def checks_environment(**names: str) -> dict[str, str]:
    """The environment variables of a run of checks: nothing of this process's own settings."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    return kept | {"PYTHONDONTWRITEBYTECODE": "1", "LANGSMITH_TRACING": "false"} | names
