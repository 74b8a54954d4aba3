"""bench/fleet.py: the router's choice over many replicas, in virtual time."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


def simulate(*options: str):
    command = [sys.executable, str(BENCH / "fleet.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    return {(row["replicas"], row["policy"]): row for row in rows}


def test_later_turns_find_their_picture_and_no_replica_gets_far_more_than_the_mean():
    rows = simulate("--replicas", "1,3", "--conversations", "67", "--requests-per-replica", "4")
    chosen, blind = rows[3, "affinity"], rows[3, "least loaded"]
    assert chosen["hit_rate"] >= 0.95
    assert chosen["busiest_over_mean"] <= 1.5
    assert blind["hit_rate"] < 0.6
    alone = [{**row, "policy": ""} for (replicas, _), row in rows.items() if replicas == 1]
    assert alone[0] == alone[1] == alone[2]


def test_a_trace_is_replayed_by_its_times(tmp_path):
    trace = tmp_path / "trace.jsonl"
    line = {"picture": "a", "prompt_s": 0.5, "answer_s": 1.0}
    trace.write_text("".join(json.dumps(line | {"at": at}) + "\n" for at in (10.0, 0.0, 0.0)))
    (row,) = [
        row
        for (_, policy), row in simulate(
            "--trace", str(trace), "--replicas", "1", "--vision", "0.11"
        ).items()
        if policy == "affinity"
    ]
    assert row["hit_rate"] == 1.0
    # 0.11 s of vision and 0.5 s, then 0.5 s more behind it; ten seconds later 0.5 s alone
    assert row["ttft_p50_s"] == pytest.approx(0.61)
    assert row["ttft_p99_s"] == pytest.approx(1.11)


def test_the_worked_example_of_the_page_is_what_its_formula_gives():
    page = (BENCH.parent / "docs/explanation/fleet.md").read_text()
    code = re.search(r"(?m)^    def servers\(.*\n(?:    .*\n)+", page)
    names = {"math": math}
    exec(textwrap.dedent(code[0]), names)  # noqa: S102 - our own page
    rows = re.findall(r"(?m)^\| [^|]* \| (0\.\d+) \|.*= (\d+) \|$", page)
    assert len(rows) == 3
    for hits, count in rows:
        found = names["servers"](50, 5, float(hits), 64, 0.065, 0.002, 0.0081, 64)
        assert found == int(count)
    (example,) = re.findall(r"servers\(50, .*\)    # (\d+)", page)
    assert int(example) == int(rows[0][1])
