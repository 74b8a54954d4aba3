"""Runs the tests marked `gpu`, some processes at once, and counts how they ended.

Owns the list of files, the processes and their time. Each process has a share of the tests; this
module is also the pytest plugin that gives it its share and notes each end at once, so that a run
that is cut short leaves what it has found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .paths import ROOT

# every file with tests marked `gpu`, and no other: others import what a bare machine lacks
FILES = (
    "tests/models/test_gpu.py",
    "tests/models/attention/test_attention.py",
    "tests/models/execution/test_decode_graphs.py",
    "tests/models/decoder/int8/test_int8.py",
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
    """How the tests ended: counts, the failures with their last lines, and what was cut.

    folder: for logs; limit_s: after which what still runs is ended.
    """
    count = num_processes or max(1, min(MOST_PROCESSES, len(os.sched_getaffinity(0)) // 2))
    began = time.monotonic()
    children = [_start(files, environment, folder, f"{number}/{count}") for number in range(count)]
    try:
        codes = [_wait(child, began + limit_s) for child in children]
    finally:  # also where the run is asked to end meanwhile
        for child in children:
            child.kill()
            child.wait()
    notes = [note for number in range(count) for note in _notes(folder, number)]
    return _summary(notes, codes, folder) | {"seconds": round(time.monotonic() - began, 1)}


def _start(
    files: Sequence[str], environment: Mapping[str, str], folder: Path, share: str
) -> subprocess.Popen[bytes]:
    number = share.split("/")[0]
    variables = {_SHARE: share, _NOTES: str(_notes_file(folder, int(number)))}
    variables["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # whatever else a machine has installed
    plugin = f"{__package__.rpartition('.')[2]}.{__name__.rpartition('.')[2]}"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", f"vlmserve.bench.{plugin}"]
    # a warning of another torch or driver is no failure here
    command += ["-o", "filterwarnings=default", "-p", "no:cacheprovider", *files]
    with (folder / f"tests-{number}.log").open("wb") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env={**environment, **variables}, stdout=log, stderr=log
        )


def _wait(child: subprocess.Popen[bytes], deadline: float) -> int | None:
    """Its exit code; None where it had to be ended."""
    try:
        return child.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return None


def _notes_file(folder: Path, number: int) -> Path:
    return folder / f"tests-{number}.jsonl"


def _notes(folder: Path, number: int) -> Iterator[dict[str, Any]]:
    file = _notes_file(folder, number)
    if file.exists():
        for line in file.read_text("utf-8").splitlines():
            yield json.loads(line)


def _summary(notes: list[dict[str, Any]], codes: list[int | None], folder: Path) -> dict[str, Any]:
    ended = {(note["test"], note["outcome"]) for note in notes if "outcome" in note}
    counts = {
        word: sum(outcome == word for _, outcome in ended)
        for word in ("passed", "failed", "skipped")
    }
    failures = [note for note in notes if note.get("outcome") == "failed"]
    selected = sum(note["selected"] for note in notes if "selected" in note)
    summary: dict[str, Any] = {
        **counts,
        "selected": selected,
        "cut_short": codes.count(None),
        "failures": [{"test": f["test"], "error": f["error"]} for f in failures[:SHOWN_FAILURES]],
        "skips": sorted({note["error"] for note in notes if note.get("outcome") == "skipped"}),
    }
    # 5: nothing was selected; 1: tests failed, which was noted
    broken = [n for n, code in enumerate(codes) if code not in (0, 1, 5, None)]
    if broken:
        log = (folder / f"tests-{broken[0]}.log").read_text("utf-8", "replace")
        summary["failed"] += len(broken)
        summary["failures"].append({"test": "pytest itself", "error": log[-2000:]})
    return summary


# As a plugin


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep this process's share of what was selected."""
    number, count = (int(part) for part in os.environ[_SHARE].split("/"))
    mine = [item for item in items if item.get_closest_marker("gpu")][number::count]
    _note(selected=len(mine))
    others = [item for item in items if item not in mine]
    items[:] = mine
    config.hook.pytest_deselected(items=others)


def pytest_runtest_logreport(report: Any) -> None:
    """Note a test's end: its own, or that it was skipped or failed before."""
    if report.when != "call" and report.outcome == "passed":
        return
    error = "" if report.outcome == "passed" else _last_words(report)
    _note(test=report.nodeid, outcome=report.outcome, error=error)


def _last_words(report: Any) -> str:
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return str(report.longrepr[-1])
    return str(report.longrepr)[-1500:]


def _note(**facts: Any) -> None:
    with open(os.environ[_NOTES], "a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")
