"""The reference's two curls, run as they stand, against a real worker and engine."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "support" / "documented_curls.py"
NAME = "meta/llama-3.2-11b-vision-instruct"


def can_unshare() -> bool:
    if not shutil.which("unshare") or not shutil.which("curl"):
        return False
    return subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def answers() -> dict:
    if not can_unshare():
        pytest.skip("needs curl and network namespaces (unshare -rn)")
    done = subprocess.run(
        ["unshare", "-rn", sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "error" not in found, (found, done.stderr)
    return found


def test_the_documented_chat_curl_is_answered_in_the_documented_shape(answers):
    answer = answers["curl_chat_completions.sh"]
    assert list(answer) == [
        "id",
        "object",
        "created",
        "model",
        "choices",
        "usage",
        "prompt_logprobs",
    ]
    assert re.fullmatch(r"chat-[0-9a-f]{32}", answer["id"])
    assert answer["object"] == "chat.completion"
    assert answer["model"] == NAME
    (choice,) = answer["choices"]
    assert list(choice) == ["index", "message", "logprobs", "finish_reason", "stop_reason"]
    assert list(choice["message"]) == ["role", "content"]
    assert choice["message"]["content"]
    assert list(answer["usage"])[:3] == ["prompt_tokens", "total_tokens", "completion_tokens"]
    assert answer["prompt_logprobs"] is None


def test_the_documented_llama_stack_curl_is_answered_in_the_documented_shape(answers):
    answer = answers["curl_llama_stack.sh"]
    assert list(answer) == ["completion_message", "logprobs"]
    message = answer["completion_message"]
    assert list(message)[:3] == ["role", "content", "stop_reason"]
    assert message["role"] == "assistant"
    assert message["content"]
    assert message["stop_reason"] == "end_of_turn"
