"""guidellm: short runs over chat completions and completions, with and without pictures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN_TIMEOUT_S = 900
NUM_REQUESTS = 4
PROMPTS = "prompt_tokens=24,output_tokens=6"


def run(folder, url, model, route, data, profile, tokenizer):
    """The one benchmark of a run, as guidellm writes it."""
    report = folder / "report.json"
    backend = f"kind=openai_http,target={url},model={model},request_format={route}"
    command = [str(Path(sys.executable).parent / "guidellm"), "run", "--backend", backend]
    command += ["--data", data, "--profile", profile]
    command += ["--tokenizer", f"kind=hf_auto,model={tokenizer}"]
    command += ["--constraint", f"kind=max_requests,count={NUM_REQUESTS}"]
    command += ["--output", f"kind=json,path={report}", "--disable-console"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    return benchmark


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_a_run_of_texts_has_a_result_without_errors(tmp_path, url, model, tokenizer, route):
    data = f"kind=synthetic_text,{PROMPTS}"
    benchmark = run(tmp_path, url, model, route, data, "kind=concurrent,streams=2", tokenizer)
    check(benchmark)


def test_a_run_of_pictures_has_a_result_without_errors(tmp_path, url, model, tokenizer):
    data = "kind=synthetic_image,width=64,height=64"
    route = "/v1/chat/completions"
    benchmark = run(tmp_path, url, model, route, data, "kind=synchronous", tokenizer)
    check(benchmark)


def check(benchmark):
    requests = benchmark["requests"]
    assert (requests["errored"], len(requests["successful"])) == ([], NUM_REQUESTS)
    for one in requests["successful"]:
        assert one["output_tokens"] > 0
        assert one["time_to_first_token_ms"] > 0
