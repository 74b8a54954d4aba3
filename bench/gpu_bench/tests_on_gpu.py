"""Runs the tests marked `gpu` in several processes and counts their outcomes.

Owns the list of files, the processes and their time. This module is also the pytest plugin that
selects a process's share of the tests and records each outcome at once, so that a run that is cut
short keeps what it has found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .paths import ROOT

# every file with tests marked `gpu`, and no other: others import packages that may be missing
FILES = (
    "tests/models/test_gpu.py",
    "tests/models/attention/test_attention.py",
    "tests/models/execution/test_decode_graphs.py",
    "tests/models/decoder/int8/test_int8.py",
    "tests/models/lora/test_kernels.py",
    "tests/models/memory/test_memory.py",
    "tests/models/decoder/test_operations.py",
    "tests/models/execution/test_synchronizations.py",
)
MOST_PROCESSES = 6
SHOWN_FAILURES = 30
_SHARE, _NOTES = "GPU_BENCH_SHARE", "GPU_BENCH_NOTES"


def run_tests(
    files: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    limit_s: float,
    num_processes: int | None = None,
) -> dict[str, Any]:
    """Return counts, the failures with their last lines, and how many processes were cut short.

    folder: for logs. limit_s: after these seconds, processes that still run are killed.
    """
    count = num_processes or max(1, min(MOST_PROCESSES, len(os.sched_getaffinity(0)) // 2))
    started = time.monotonic()
    children = [_start(files, environment, folder, number, count) for number in range(count)]
    try:
        codes = [_wait(child, started + limit_s) for child in children]
    finally:  # also when the run is interrupted
        for child in children:
            child.kill()
            child.wait()
    summary = _summary(folder, codes)
    return summary | {"seconds": round(time.monotonic() - started, 1)}


def _start(
    files: Sequence[str], environment: Mapping[str, str], folder: Path, number: int, count: int
) -> subprocess.Popen[bytes]:
    variables = {_SHARE: f"{number}/{count}", _NOTES: str(folder / f"tests-{number}.jsonl")}
    variables["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # the machine may have other plugins
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    command += ["-p", "vlmserve.bench.gpu_bench.tests_on_gpu", "-p", "no:cacheprovider"]
    # warnings of another torch or driver are no failures here
    command += ["-o", "filterwarnings=default", *files]
    with (folder / f"tests-{number}.log").open("wb") as log:
        env = {**environment, **variables}
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)


def _wait(child: subprocess.Popen[bytes], deadline: float) -> int | None:
    """Return its exit code, or None if it was killed at the deadline."""
    try:
        return child.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return None


def _summary(folder: Path, codes: list[int | None]) -> dict[str, Any]:
    files = sorted(folder.glob("tests-*.jsonl"))
    notes = [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]
    ends = [note for note in notes if "outcome" in note]
    counts = Counter(outcome for _, outcome in {(end["test"], end["outcome"]) for end in ends})
    failures = [{"test": e["test"], "error": e["error"]} for e in ends if e["outcome"] == "failed"]
    # 5: nothing was selected; 1: tests failed, and their notes say so
    broken = [number for number, code in enumerate(codes) if code not in (0, 1, 5, None)]
    for number in broken[:1]:
        log = (folder / f"tests-{number}.log").read_text("utf-8", "replace")
        failures.append({"test": "pytest itself", "error": log[-2000:]})
    return {
        "passed": counts["passed"],
        "failed": counts["failed"] + len(broken),
        "skipped": counts["skipped"],
        "selected": sum(note.get("selected", 0) for note in notes),
        "cut_short": codes.count(None),
        "failures": failures[:SHOWN_FAILURES],
        "skips": sorted({end["error"] for end in ends if end["outcome"] == "skipped"}),
    }


# The pytest plugin


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep this process's share of the selected tests."""
    number, count = (int(part) for part in os.environ[_SHARE].split("/"))
    mine = [item for item in items if item.get_closest_marker("gpu")][number::count]
    _note(selected=len(mine))
    others = [item for item in items if item not in mine]
    items[:] = mine
    config.hook.pytest_deselected(items=others)


def pytest_runtest_logreport(report: Any) -> None:
    """Record a test's outcome; a skip or a failure may come from its setup."""
    if report.when != "call" and report.outcome == "passed":
        return
    is_skip = report.outcome == "skipped" and isinstance(report.longrepr, tuple)
    reason = str(report.longrepr[-1] if is_skip else report.longrepr or "")[-1500:]
    error = "" if report.outcome == "passed" else reason
    _note(test=report.nodeid, outcome=report.outcome, error=error)


def _note(**facts: Any) -> None:
    with open(os.environ[_NOTES], "a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")
