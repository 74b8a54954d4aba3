"""aiperf: short runs over chat, completions and responses, streamed, with and without pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN_TIMEOUT_S = 900
NUM_REQUESTS = 4


def run(folder, url, model, tokenizer, *options):
    """What aiperf measured, as it writes it."""
    command = [str(Path(sys.executable).parent / "aiperf"), "profile", "--model", model]
    command += ["--url", url, "--tokenizer", str(tokenizer), "--streaming"]
    command += ["--request-count", str(NUM_REQUESTS), "--concurrency", "2", "--osl", "6"]
    command += ["--isl", "24", "--isl-stddev", "0", "--random-seed", "1", "--ui", "none"]
    command += ["--output-artifact-dir", str(folder), *options]
    # Offline it takes a tokenizer's folder for a name on the hub. Nothing listens at this hub.
    variables = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        cwd=folder,
        check=False,
        env=variables | {"HF_ENDPOINT": "http://127.0.0.1:9"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [report] = folder.glob("**/profile_export_aiperf.json")
    return json.loads(report.read_text())


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_a_run_of_texts_has_a_result_without_errors(tmp_path, url, model, tokenizer, endpoint):
    counts = ["--use-server-token-count", "--extra-inputs", "ignore_eos:true"]
    report = run(tmp_path, url, model, tokenizer, "--endpoint-type", endpoint, *counts)
    check(report)
    assert report["output_sequence_length"]["avg"] == 6


def test_a_run_of_pictures_has_a_result_without_errors(tmp_path, url, model, tokenizer):
    sizes = ["--image-width-mean", "64", "--image-height-mean", "64"]
    check(run(tmp_path, url, model, tokenizer, "--endpoint-type", "chat", *sizes))


def check(report):
    assert report["request_count"]["avg"] == NUM_REQUESTS
    assert not report.get("error_summary")
    assert report["time_to_first_token"]["avg"] > 0
