"""The benchmark scripts: the last line they print is one JSON document."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent.parent / "bench"


def test_the_last_line_of_a_spawned_load_run_is_one_json_document():
    done = subprocess.run(
        [
            sys.executable,
            str(BENCH / "serve.py"),
            "--dtype",
            "float32",
            "--concurrency",
            "2",
            "--requests",
            "3",
            "--output-tokens",
            "4",
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.strip().splitlines()[-1])
    (level,) = document["levels"]
    assert (level["requests"], level["errors"], level["output_tokens"]) == (3, 0, 3 * 4)
    assert {"processor", "cores", "torch", "commit", "command"} <= set(document["machine"])


def test_a_run_of_steps_alone_ends_in_one_json_document_with_the_bound_of_each():
    done = subprocess.run(
        [
            sys.executable,
            str(BENCH / "decode.py"),
            "--sequences",
            "1,3",
            "--prefills",
            "2",
            "--rounds",
            "2",
            "--steps",
            "1",
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.strip().splitlines()[-1])
    steps = [(level["step"], level["sequences"]) for level in document["levels"]]
    decodes = [(f"decode, {kind}", count) for kind in ("text", "image") for count in (1, 3)]
    assert steps == [*decodes, ("prefill", 2)]
    text, image, prefill = document["levels"][1], document["levels"][3], document["levels"][4]
    assert 0 < text["gflop"] < image["gflop"] < prefill["gflop"]
    assert text["megabytes"] < image["megabytes"]
    for level in document["levels"]:
        assert level["wall_ms"] > 0
        assert level["bound_ms"] > 0
    assert {"processor", "torch", "commit", "command"} <= set(document["machine"])
    assert {"device", "dtype", "threads", "model", "reached"} <= set(document)
