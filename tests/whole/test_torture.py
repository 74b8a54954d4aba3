"""Small seeded samples of what `make torture` runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


def run(*arguments) -> dict:
    """The JSON document in the last line of a part of the torture, which must have passed."""
    command = [sys.executable, str(BENCH / "torture.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_no_client_is_left_hanging_when_engines_are_killed_under_load():
    figures = run("kills", "--engine", "hashing", "--count", "3", "--clients", "8", "--slack", "5")
    assert (figures["kills"], figures["hanging"], figures["broken"]) == (3, 0, [])
    outcomes = figures["outcomes"]
    assert outcomes.get("HTTP 503", 0) + outcomes.get("error event", 0) > 3


@pytest.mark.slow
def test_clients_that_leave_a_real_server_leave_nothing_behind():
    figures = run("cancels", "--count", "60", "--clients", "6")
    assert (figures["cancels"], figures["broken"]) == (60, [])
    assert set(figures["stages"].values()) == {10}


@pytest.mark.slow
def test_more_than_can_be_served_is_refused_and_the_rest_is_served():
    """Its figures are no promise here: other work may share the machine."""
    # So short a wait that nobody waits: some are refused however wrong the capacity is measured.
    figures = run(
        *("overload", "--seconds", "2", "--max-tokens", "16", "--slack", "1000"),
        *("--max-num-seqs", "2", "--max-queue-wait", "0.001"),
    )
    assert figures["at_2"]["refused"] > 0
    assert figures["at_2"]["accepted"] > 0
    assert figures["at_2"]["other_errors"] == figures["at_0.9"]["other_errors"] == 0
