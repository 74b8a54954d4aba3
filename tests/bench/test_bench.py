"""The benchmark scripts: the last line they print is one JSON document."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vlmserve.models.bundled import CHECKPOINT

BENCH = Path(__file__).resolve().parents[2] / "bench"


def last_document(script: str, *arguments: str) -> dict:
    """The JSON document in the last line that a script prints."""
    command = [sys.executable, str(BENCH / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_the_last_line_of_a_spawned_load_run_is_one_json_document():
    document = last_document(
        "serve.py",
        "--dtype",
        "float32",
        "--concurrency",
        "2",
        "--requests",
        "3",
        "--output-tokens",
        "4",
    )
    (level,) = document["levels"]
    assert (level["requests"], level["errors"], level["output_tokens"]) == (3, 0, 3 * 4)
    assert {"processor", "cores", "torch", "commit", "command"} <= set(document["machine"])


@pytest.mark.slow
def test_a_run_of_steps_alone_ends_in_one_json_document_with_the_bound_of_each():
    document = last_document(
        "decode.py", "--sequences", "1,3", "--prefills", "2", "--rounds", "2", "--steps", "1"
    )
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


@pytest.mark.slow
def test_a_run_of_the_engine_alone_tells_each_parts_share_of_a_step():
    document = last_document("overhead.py", "--sequences", "4", "--steps", "5")
    parts = document["parts_ms"]
    assert {"model's forward", "schedule", "metadata", "sampling", "messages"} <= set(parts)
    assert all(milliseconds > 0 for milliseconds in parts.values())
    assert abs(sum(parts.values()) - document["step_ms"]) < 0.01
    assert 0 < document["overhead_share"] < 1


@pytest.mark.slow
def test_a_second_turn_is_measured_with_nothing_encoded_in_it():
    document = last_document(
        "second_turn.py", "--checkpoint", str(CHECKPOINT), "--dtype", "float32", "--pictures", "1"
    )
    assert document["encoded_in_second_turns"] == 0
    assert document["vision_ms"] > 0
    assert min(document["ttft_ms"].values()) > 0


@pytest.mark.slow
def test_steps_with_adapters_are_measured_beside_the_same_steps_without():
    document = last_document(
        *("adapters.py", "--sequences", "2", "--adapters", "2", "--rank", "4"),
        *("--rounds", "2", "--steps", "1"),
    )
    kinds = [level["kind"] for level in document["levels"]]
    assert kinds == ["none", "unused", "one", "several"]
    assert document["levels"][0]["wall_ratio"] == document["levels"][0]["cpu_ratio"] == 1
    for level in document["levels"]:
        assert min(level["wall_ms"], level["cpu_ms"], level["wall_ratio"]) > 0
