"""Small seeded samples of what `make torture` runs."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vlmserve.server.bench.client import Sample

BENCH = Path(__file__).resolve().parents[2] / "bench"


def run(*arguments, timeout_s=1200) -> dict:
    """The JSON document in the last line of a part of the torture, which must have passed."""
    command = [sys.executable, str(BENCH / "torture.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
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
def test_a_neighbour_of_each_attack_is_served():
    """Its latencies are no promise here: other work may share the machine."""
    figures = run(*("neighbours", "--size", "0.05", "--count", "2", "--slack", "1000"))
    assert len(figures["attacks"]) == 9
    for name, row in figures["attacks"].items():
        assert row["failures"] == [], name
        assert row["alone_s"] > 0
        assert row["beside_max_s"] > 0
        # Attackers get answers or refusals; none breaks the server.
        assert not {"500", "502"} & row["attacker"].keys(), name


def test_a_saturating_load_sends_again_what_was_refused(monkeypatch):
    """On a slow machine all was refused: the capacity was 0, and the next arrival never."""
    monkeypatch.syspath_prepend(str(BENCH))
    import torture_overload

    errors = ["HTTP 429", "HTTP 429", None, "HTTP 500"]
    asked = []

    class Client:
        async def chat(self, body, due=None):
            asked.append(body)
            return Sample(due=0.0, sent=0.0, error=errors[len(asked) - 1])

    monkeypatch.setattr(torture_overload, "PAUSE_AFTER_REFUSAL_S", 0.0)
    client = torture_overload.Patient(Client())
    assert asyncio.run(client.chat(b"a")).error is None
    assert asyncio.run(client.chat(b"b")).error == "HTTP 500"
    assert asked == [b"a", b"a", b"a", b"b"]


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
