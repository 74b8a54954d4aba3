"""The lower end of the supported range: Python 3.12, torch 2.11, transformers 5.17.

The upper end is what requirements/ pins and every other test runs on.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OLDEST = ["torch==2.11.0", "transformers==5.17.0"]
# What transformers and torch bound themselves is left to their own requirements.
UNPINNED = (
    "-r",
    "torch==",
    "transformers==",
    "huggingface_hub==",
    "hf-xet==",
    "tokenizers==",
    "triton==",
)
OLDEST_PYTHON_TESTS = [
    "tests/models/attention/test_attention.py",
    "tests/models/execution/test_runner_oracle.py",
    "tests/models/sampling/test_sampler.py",
    "tests/router/scheduler/test_scheduler.py",
    "tests/router/engine/test_engine.py",
    "tests/models/decoder/test_mllama_fixes.py",
    "tests/whole/test_end_to_end.py",
]
INSTALL_TIMEOUT_S = 1500
TEST_TIMEOUT_S = 1200


def other_python() -> str:
    """An interpreter of the range other than the running one, else the running one."""
    wanted = "python3.12" if sys.version_info[:2] == (3, 11) else "python3.11"
    candidates = [shutil.which(wanted)]
    candidates += sorted(str(p) for p in Path.home().glob(f".pyenv/versions/3.*/bin/{wanted}"))
    for candidate in candidates:
        works = candidate and not subprocess.run([candidate, "-c", "import venv"]).returncode
        if works:
            return candidate
    return sys.executable


def oldest_requirements() -> list[str]:
    """The project's pins with torch and transformers at the lower end of the range."""
    pins = []
    for name in ("base.txt", "test.txt"):
        lines = (ROOT / "requirements" / name).read_text().splitlines()
        pins += [line for line in lines if not line.startswith(UNPINNED)]
    return [*OLDEST, "triton", *pins]


@pytest.fixture(scope="module")
def oldest_python(tmp_path_factory) -> Path:
    """The interpreter of a fresh virtual environment at the lower end of the range."""
    folder = tmp_path_factory.mktemp("oldest") / "venv"
    subprocess.run([other_python(), "-m", "venv", str(folder)], check=True, timeout=300)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    pip.append("--no-compile")  # of torch's thousands of modules few are imported
    index = os.environ.get("TORCH_INDEX_URL")
    if index:
        subprocess.run(
            [*pip, "--index-url", index, OLDEST[0]], check=True, timeout=INSTALL_TIMEOUT_S
        )
    subprocess.run([*pip, *oldest_requirements()], check=True, timeout=INSTALL_TIMEOUT_S)
    subprocess.run([*pip, "--no-deps", "-e", str(ROOT)], check=True, timeout=INSTALL_TIMEOUT_S)
    return python


@pytest.mark.slow
def test_the_engine_and_server_pass_their_tests_at_the_lower_end_of_the_range(oldest_python):
    files = [name for name in OLDEST_PYTHON_TESTS if (ROOT / name).exists()]
    assert len(files) == len(OLDEST_PYTHON_TESTS), "a listed test file is gone: mend the list"
    done = subprocess.run(
        [
            str(oldest_python),
            "-m",
            "pytest",
            "-q",
            "-m",
            "not slow and not soak and not gpu",
            "-x",
            *files,
        ],
        cwd=ROOT,
        timeout=TEST_TIMEOUT_S,
    )
    assert done.returncode == 0
