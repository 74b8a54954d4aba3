"""The load scripts: what they print is one JSON document, and what they send is unique."""

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent.parent / "bench"


def load_module():
    spec = importlib.util.spec_from_file_location("bench_load", BENCH / "load.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_last_line_of_a_load_run_is_one_json_document(server):
    done = subprocess.run(
        [
            sys.executable,
            str(BENCH / "serve.py"),
            "--url",
            f"{server.url}/v1",
            "--model",
            "vlmserve-tiny-vision",
            "--concurrency",
            "1,3",
            "--requests",
            "3",
            "--max-tokens",
            "6",
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.strip().splitlines()[-1])
    assert [level["concurrency"] for level in document["levels"]] == [1, 3]
    for level in document["levels"]:
        assert (level["requests"], level["errors"]) == (3, 0)
        assert level["output_tokens"] == 3 * 6
        assert 0 < level["ttft_p50_ms"] <= level["ttft_p99_ms"] <= level["end_to_end_p99_ms"]
        assert level["tokens_per_s"] > 0
    assert {"processor", "cores", "torch", "commit", "command"} <= set(document["machine"])


def test_every_picture_of_a_run_is_unique():
    pictures = list(itertools.islice(load_module().unique_pictures((64, 64), seed=3), 200))
    assert len(set(pictures)) == 200
    others = list(itertools.islice(load_module().unique_pictures((64, 64), seed=4), 200))
    assert not set(pictures) & set(others)


def test_a_failed_request_is_counted_as_an_error_and_not_as_a_fast_one():
    load = load_module()
    good = load.Sample(chunk_times=[0.5, 0.6], end=0.7, completion_tokens=2)
    bad = load.Sample(end=0.001, error="503: not ready")
    summary = load.summarize(load.Load(2, 2, 2, None, 0), [good, bad], seconds=1.0)
    assert (summary.requests, summary.errors, summary.output_tokens) == (1, 1, 2)
    assert summary.ttft_p50_ms == 500.0
    assert summary.inter_token_p50_ms == 100.0


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
