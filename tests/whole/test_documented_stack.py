"""The examples of docs/llama-stack.md, run as they stand against the bundled model."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.client_environments import CHECKS_TIMEOUT_S, checks_environment, client_python

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "llama-stack.md").read_text("utf-8")
ADDRESS = "http://127.0.0.1:8000"
SHAPES = "There is a red circle and a blue triangle on a white background."
PROGRAMS = dict(re.findall(r"```python\n# llama-stack-client ([0-9.]+)\n(.*?)```", DOCUMENT, re.S))


def test_each_documented_curl_gets_the_answer_beside_it(server):
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    pairs = re.findall(r"```bash\n(.*?)```\s+```json\n(.*?)```", DOCUMENT, re.S)
    assert len(pairs) == 2
    for command, answer in pairs:
        script = command.replace(ADDRESS, server.url)
        done = subprocess.run(
            ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert done.stdout == answer.strip()
        assert json.loads(answer)


@pytest.mark.slow
@pytest.mark.parametrize("version", PROGRAMS)
def test_each_documented_program_prints_what_the_picture_shows(version, server):
    code = PROGRAMS[version].replace(ADDRESS, server.url)
    done = subprocess.run(
        [client_python(f"llama-stack-{version}"), "-c", code],
        cwd=ROOT,
        env=checks_environment(),
        capture_output=True,
        text=True,
        timeout=CHECKS_TIMEOUT_S,
    )
    assert (done.stdout, done.returncode) == (SHAPES, 0), done.stderr


def test_an_old_and_a_new_program_are_documented():
    assert set(PROGRAMS) == {"0.0.50", "0.2.12"}
