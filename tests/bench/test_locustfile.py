"""The locust users: a short run against the real server, in locust's own process."""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCUSTFILES = [ROOT / "bench" / "locustfile.py", ROOT / "tests" / "support" / "locust_end.py"]
# Locust patches the standard library for gevent, so it never runs in the tests' process.
needs_locust = pytest.mark.skipif(
    importlib.util.find_spec("locust") is None, reason="locust is not installed"
)


def run_locust(url, folder, *options):
    """A run of three users that ends after six requests."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "locust", "-f", ",".join(map(str, LOCUSTFILES))),
            *("--host", url, "--headless", "-u", "3", "-r", "3"),
            *("--end-after", "6", "--stop-timeout", "600"),
            *("--csv", str(folder / "run"), "--only-summary", "--skip-log-setup", *options),
        ],
        capture_output=True,
        text=True,
        timeout=1500,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )


def rows_of(folder):
    with (folder / "run_stats.csv").open() as lines:
        return {row["Name"]: row for row in csv.DictReader(lines)}


@needs_locust
def test_locust_users_report_first_text_and_gaps_of_unique_pictures(server, tmp_path):
    hits = server.metric("vlmserve_image_cache_hits_total")
    misses = server.metric("vlmserve_image_cache_misses_total")
    done = run_locust(server.url, tmp_path, "--output-tokens", "8")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path)
    answers, first, gaps = (
        rows[name]
        for name in ("chat completion", "time to first text", "between two pieces of text")
    )
    assert int(answers["Request Count"]) >= 6
    assert {int(row["Failure Count"]) for row in (answers, first, gaps)} == {0}
    assert first["Request Count"] == answers["Request Count"]
    assert int(gaps["Request Count"]) > int(answers["Request Count"])
    assert 0 < float(first["Median Response Time"]) <= float(answers["Median Response Time"])
    assert server.metric("vlmserve_image_cache_hits_total") == hits
    assert server.metric("vlmserve_image_cache_misses_total") - misses >= int(
        answers["Request Count"]
    )


@needs_locust
def test_locust_counts_a_refusal_as_a_failure(server, tmp_path):
    done = run_locust(server.url, tmp_path, "--model", "no-such-model")
    assert done.returncode == 1
    rows = rows_of(tmp_path)
    assert int(rows["chat completion"]["Failure Count"]) > 0
    assert "time to first text" not in rows
