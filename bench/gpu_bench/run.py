"""The run from its command line to its last line: tests, then the rows, within a budget.

Owns the order, the budget, and the processes that measure. Imports nothing beyond the standard
library, so that whatever becomes of torch, a document comes out.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .document import DROPPED, FAILED, Document, base_machine
from .paths import FOR_TESTS, NEEDED, ROOT, lay_out, missing
from .plan import FULL, INT8, PLAIN, TINY, Row, Size, rows_of
from .tests_on_gpu import FILES, run_tests

WHEELS = ROOT / "build" / "wheels"
# parts of the time that is left: the tests', then of the plain rows beside the int8 ones
TESTS_SHARE, PLAIN_SHARE = 0.3, 0.62
# after which a process that says nothing is ended: while it starts and builds, and in a row
START_LIMIT_S, ROW_LIMIT_S = 150.0, 90.0
# less than this is not worth starting a process for
LEAST_S = 20.0
POLL_S = 0.1
LOG_BYTES = 1500
REMEDY = "run `make bench-gpu-wheels` where there is a network and name its folder with --wheels"


class Interrupted(Exception):
    """The run was asked to end: what it has is printed."""


def main() -> int:
    """0 if nothing failed of what there was time for."""
    args = _parse_arguments()
    began = time.monotonic()
    size = _size_of(args)
    folder = Path(args.out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"budget_s": args.budget_s, **asdict(size)}
    document = Document(folder, settings, base_machine(ROOT))
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, _interrupt)
    with tempfile.TemporaryDirectory(prefix="vlmserve-gpu-") as scratch:
        try:
            _Run(args, size, document, Path(scratch), began + args.budget_s).all()
        except Interrupted:
            document.notes.append("the run was asked to end early")
        except Exception as error:  # what was measured is told all the same
            document.notes.append(f"the run broke off: {type(error).__name__}: {error}")
            traceback.print_exc()
        document.keep_logs(Path(scratch))
    document.seconds = time.monotonic() - began
    document.save()
    print(json.dumps(document.content()), flush=True)
    return 0 if document.is_good else 1


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tests and measures the model on one GPU.")
    parser.add_argument("--budget-s", type=float, default=500.0, help="seconds for all of it")
    out = os.environ.get("OUT") or str(ROOT / "runs" / "gpu")
    parser.add_argument("--out", default=out, help="folder of the JSON and the logs (or $OUT)")
    parser.add_argument("--wheels", type=Path, default=WHEELS, help="folder of wheels")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on a CPU")
    parser.add_argument("--batches", default="", help="comma-separated sequences of a decode")
    parser.add_argument("--sweep", action="store_true", help="int8 products in other tilings too")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--test-files", default=",".join(FILES), help="comma-separated")
    parser.add_argument(
        "--rehearse",
        action="append",
        default=[],
        metavar="ROW=raise|die|hang",
        help="fail so in that row, to see what becomes of the others",
    )
    parser.add_argument("--row-limit-s", type=float, default=ROW_LIMIT_S)
    parser.add_argument("--start-limit-s", type=float, default=START_LIMIT_S)
    return parser.parse_args()


def _size_of(args: argparse.Namespace) -> Size:
    size = TINY if args.tiny else FULL
    batches = tuple(int(part) for part in args.batches.split(",") if part)
    return replace(size, batches=batches or size.batches, sweeps=args.sweep)


def _interrupt(number: int, frame: Any) -> None:
    raise Interrupted


class _Run:
    """One run; what it finds is in its document."""

    def __init__(
        self,
        args: argparse.Namespace,
        size: Size,
        document: Document,
        scratch: Path,
        deadline: float,
    ) -> None:
        self._args, self._size, self._document = args, size, document
        self._work, self._deadline = scratch / "work", deadline
        self._work.mkdir()
        self._num_children = 0
        wheels = args.wheels if args.wheels.is_dir() else None
        self._environment = lay_out(scratch, wheels)
        if size.device == "cuda":
            # a test run sets it where it sees no GPU
            self._environment["TRITON_INTERPRET"] = "0"

    def all(self) -> None:
        """Tests and rows, or why there are none."""
        if lacks := missing(NEEDED, self._environment["PYTHONPATH"]):
            self._document.notes.append(f"{', '.join(lacks)} missing: {REMEDY}")
            print(self._document.notes[-1], flush=True)
            return
        if not self._args.skip_tests:
            self._test()
        for quantize, share in ((PLAIN, PLAIN_SHARE), (INT8, 1.0)):
            rows = rows_of(quantize, self._size.batches)
            self._measure(quantize, rows, time.monotonic() + share * self._left())

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _test(self) -> None:
        if lacks := missing(FOR_TESTS, self._environment["PYTHONPATH"]):
            self._document.tests = {"failed": 1, "why": f"{', '.join(lacks)} missing: {REMEDY}"}
        else:
            self._document.tests = run_tests(
                self._args.test_files.split(","),
                self._environment,
                self._work,
                TESTS_SHARE * self._left(),
            )
        print(f"tests: {json.dumps(self._document.tests)}", flush=True)
        self._document.save()

    def _measure(self, quantize: str, rows: list[Row], deadline: float) -> None:
        """Every row has an entry afterwards, whatever became of the processes."""
        while rows:
            if deadline - time.monotonic() < LEAST_S:
                for row in rows:
                    self._document.add(row, DROPPED, why="no time was left to start")
                return
            rows = self._one_child(quantize, rows, deadline)

    def _one_child(self, quantize: str, rows: list[Row], deadline: float) -> list[Row]:
        """Measure until a process ends; the rows that are left."""
        self._num_children += 1
        folder, number = self._work, self._num_children
        events, log = folder / f"child-{number}.jsonl", folder / f"child-{number}.log"
        events.write_text("")
        told = {
            "size": asdict(self._size),
            "rows": [asdict(row) for row in rows],
            "deadline": deadline,
            "events": str(events),
            "rehearse": dict(one.rsplit("=", 1) for one in self._args.rehearse),
        }
        with _child(told, self._environment, log) as child:
            limits = _Limits(self._args.start_limit_s, self._args.row_limit_s, self._deadline)
            watch = _Watch(child, events, limits)
            pending = {row.id: row for row in rows}
            for event in watch.events():
                self._take(quantize, event, pending)
        if not pending:
            return []
        failed = _failed_with(watch, list(pending.values()))
        for row in failed:
            self._document.add(row, FAILED, error=f"{watch.why}\n{_end_of(log)}")
        return [row for row in pending.values() if row not in failed]

    def _take(self, quantize: str, event: dict[str, Any], pending: dict[str, Row]) -> None:
        facts = {key: value for key, value in event.items() if key != "event"}
        match event["event"]:
            case "machine":
                self._document.machine |= facts
            case "bandwidth":
                self._document.bandwidth[quantize] = facts
            case "built":
                self._document.runners[facts.pop("of")] = facts
            case "row":
                row = pending.pop(facts.pop("row"))
                self._document.add(row, facts.pop("status"), **facts)


@dataclass(frozen=True, slots=True)
class _Limits:
    """Seconds until a process that starts or builds, or one in a row, is ended; and when all are.

    deadline: of `time.monotonic()`.
    """

    start_s: float
    row_s: float
    deadline: float


class _Watch:
    """One process's events as they come, and why they ended."""

    def __init__(self, child: subprocess.Popen[bytes], events: Path, limits: _Limits) -> None:
        self._child, self._events, self._limits = child, events, limits
        self.current: str | None = None
        self.is_building = False
        self.num_rows = 0
        self.why = ""

    def events(self) -> Iterator[dict[str, Any]]:
        """Until the process has ended, by itself or because it took too long."""
        deadline = self._limits.deadline
        limit = time.monotonic() + self._limits.start_s
        with self._events.open("r", encoding="utf-8") as stream:
            part = ""
            while True:
                has_ended = self._child.poll() is not None
                part += stream.read()
                *lines, part = part.split("\n")
                for line in lines:
                    event = json.loads(line)
                    limit = time.monotonic() + self._note(event)
                    yield event
                if has_ended:
                    self.why = self.why or f"the process ended with code {self._child.returncode}"
                    return
                if (now := time.monotonic()) > min(limit, deadline):
                    of = "the budget has" if now > deadline else "a row or a start may take"
                    self.why = f"ended: it took longer than {of}"
                    self._child.kill()
                    self._child.wait()
                time.sleep(POLL_S)

    def _note(self, event: dict[str, Any]) -> float:
        """Seconds until the next event is due."""
        self.is_building = event["event"] == "building"
        if event["event"] in ("building", "begin"):
            self.current = event["row"]
        elif event["event"] == "row":
            self.current = None
            self.num_rows += 1
        return self._limits.row_s if event["event"] == "begin" else self._limits.start_s


def _failed_with(watch: _Watch, pending: list[Row]) -> list[Row]:
    """Which of the rows that are left a process has taken with it.

    What does not start, or cannot be built, would not the next time either.
    """
    current = [row for row in pending if row.id == watch.current]
    if current and watch.is_building:
        return [row for row in pending if row.mode == current[0].mode]
    if not current and watch.num_rows == 0:
        return pending
    return current


@contextmanager
def _child(
    told: dict[str, Any], environment: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A measuring process, ended with the block."""
    command = [sys.executable, "-m", "vlmserve.bench.gpu_bench.child"]
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            cwd=log.parent,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
        )
    try:
        assert child.stdin is not None
        child.stdin.write(json.dumps(told).encode())
        child.stdin.close()
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()


def _end_of(log: Path) -> str:
    return log.read_text("utf-8", "replace")[-LOG_BYTES:].strip()
