"""`vlmserve run-batch` as a process: killed and run again, and with a server of its own."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

RUN_BATCH = (sys.executable, "-m", "vlmserve.server", "run-batch")
DEADLINE_S = 600


def write_lines(file, number):
    file.write_text(
        "".join(
            json.dumps(
                {
                    "custom_id": f"request {index}",
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": {
                        "messages": [{"role": "user", "content": f"Hello {index}!"}],
                        "max_tokens": 4,
                    },
                }
            )
            + "\n"
            for index in range(number)
        )
    )


def ids_of(out):
    return [json.loads(line)["custom_id"] for line in out.read_text().splitlines()]


@pytest.mark.parametrize("number", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_and_each_line_has_one_result(server, tmp_path, wait_for, number):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_lines(source, number)
    command = [*RUN_BATCH, str(source), str(out), "--url", server.url, "--concurrency", "8"]
    for part in (0.2, 0.6):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        due = int(part * number)
        assert wait_for(
            lambda due=due: out.exists() and out.read_bytes().count(b"\n") >= due, DEADLINE_S
        )
        process.kill()
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    assert sorted(ids_of(out)) == sorted(f"request {index}" for index in range(number))


@pytest.mark.slow
def test_without_a_url_a_server_is_started_for_the_run_and_stopped(tmp_path):
    Image.new("RGB", (224, 224), "white").save(tmp_path / "blank.png")
    out = tmp_path / "out.jsonl"
    command = [*RUN_BATCH, "--images", str(tmp_path), "--prompt", "What is in this image?"]
    command += ["--fields", '{"max_tokens": 8, "temperature": 0}', str(out)]
    command += ["--serve-option=--max-num-seqs=4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=DEADLINE_S, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "1 answered, 0 failed" in done.stderr
    assert ids_of(out) == ["blank.png"]


def test_a_server_that_does_not_start_is_one_line(tmp_path):
    write_lines(tmp_path / "in.jsonl", 1)
    command = [*RUN_BATCH, str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]
    command += ["--model", str(tmp_path / "no-model")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 2
    assert "the server did not start" in done.stderr
    assert "Traceback" not in done.stderr
