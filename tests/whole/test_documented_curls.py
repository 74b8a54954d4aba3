"""The reference's curls, run as they stand, against a worker of their own and the shared
server's engine."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.engine_side import engine_socket
from support.shapes import shape_of

DATA = Path(__file__).resolve().parents[1] / "data"
SCRIPT = Path(__file__).resolve().parents[1] / "support" / "documented_curls.py"


def can_unshare() -> bool:
    if not shutil.which("unshare") or not shutil.which("curl"):
        return False
    return subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def printed(session_standing) -> dict:
    if session_standing.server.process is None:
        pytest.skip("the server is elsewhere")
    if not can_unshare():
        pytest.skip("needs curl and network namespaces (unshare -rn)")
    done = subprocess.run(
        ["unshare", "-rn", sys.executable, str(SCRIPT), engine_socket(session_standing.engine_pid)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "error" not in found["answers"], (found, done.stderr)
    return found


@pytest.fixture(scope="module")
def answers(printed) -> dict:
    return printed["answers"]


def sample(name: str) -> dict:
    return json.loads((DATA / f"{name}.response.json").read_text())


def test_every_documented_curl_was_run(standing, answers):
    assert set(answers) == {"models", "ready", "live", "chat_completions", "llama_stack"}


@pytest.mark.parametrize("name", ["ready", "live"])
def test_the_health_curls_get_the_documented_answers(answers, name):
    assert list(answers[name].items()) == list(sample(name).items())


def test_the_models_curl_is_answered_in_the_documented_shape(answers):
    answer, documented = answers["models"], sample("models")
    assert shape_of(answer) == shape_of(documented)
    card, expected = answer["data"][0], documented["data"][0]
    changing = {"created", "max_model_len", "permission"}
    assert all(card[key] == expected[key] for key in expected.keys() - changing)


def test_the_chat_curl_is_answered_in_the_documented_shape(answers):
    answer, documented = answers["chat_completions"], sample("chat")
    assert shape_of(answer) == shape_of(documented)
    assert re.fullmatch(r"chat-[0-9a-f]{32}", answer["id"])
    for key in ("object", "model", "prompt_logprobs"):
        assert answer[key] == documented[key]
    (choice,), (expected,) = answer["choices"], documented["choices"]
    assert (choice["index"], choice["message"]["role"]) == (0, expected["message"]["role"])
    # The request samples, so that what is said may differ; the prompt's words are one token each.
    assert choice["message"]["content"]
    assert answer["usage"]["prompt_tokens"] == documented["usage"]["prompt_tokens"]


def test_the_llama_stack_curl_is_answered_in_the_documented_shape(printed):
    answer, documented = printed["answers"]["llama_stack"], sample("llama_stack")
    assert shape_of(answer) == shape_of(documented)
    assert answer["completion_message"]["stop_reason"] == "end_of_turn"
    assert answer["completion_message"]["content"] == printed["picture"]
