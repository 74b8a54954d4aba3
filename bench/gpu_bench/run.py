"""The run from its command line to its last line: tests, then the rows, within a budget.

Owns the order, the budget, and the processes that measure. Imports only the standard library, so
that a document comes out even if torch fails.
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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .document import DROPPED, FAILED, Document, base_machine
from .paths import FOR_TESTS, NEEDED, ROOT, lay_out, missing
from .plan import FULL, INT8, PLAIN, TINY, Row, Size, rows_of
from .tests_on_gpu import FILES, run_tests
from .verdict import verdict

WHEELS = ROOT / "build" / "wheels"
# shares of the remaining time: for the tests, and for the plain rows beside the int8 rows
TESTS_SHARE, PLAIN_SHARE = 0.3, 0.62
# seconds after which a silent process is killed: while it starts and builds, and in a row
START_LIMIT_S, ROW_LIMIT_S = 150.0, 90.0
# with less time than this, no process starts
LEAST_S = 20.0
POLL_S = 0.1
LOG_BYTES = 1500
REMEDY = "run `make bench-gpu-wheels` on a machine with a network and pass its folder as --wheels"


class Interrupted(Exception):
    """A signal asked the run to stop: it prints what it has."""


def main() -> int:
    """Return 0 if nothing failed of what there was time for."""
    args = _parse_arguments()
    if args.verdict:
        print("\n".join(verdict(json.loads(args.verdict.read_text("utf-8")))))
        return 0
    started = time.monotonic()
    size = _size_of(args)
    folder = Path(args.out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"budget_s": args.budget_s, **asdict(size)}
    document = Document(folder, settings, base_machine(ROOT))
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, _interrupt)
    with tempfile.TemporaryDirectory(prefix="vlmserve-gpu-") as scratch:
        try:
            _Run(args, size, document, Path(scratch), started + args.budget_s).all()
        except Interrupted:
            document.notes.append("the run was asked to end early")
        except Exception as error:  # the document keeps what was measured
            document.notes.append(f"the run broke off: {type(error).__name__}: {error}")
            traceback.print_exc()
        document.keep_logs(Path(scratch))
    document.seconds = time.monotonic() - started
    document.save()
    print(json.dumps(document.content()), flush=True)
    return 0 if document.is_good else 1


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tests and measures the model on one GPU.")
    add = parser.add_argument
    add("--budget-s", type=float, default=500.0, help="seconds for the whole run")
    out = os.environ.get("OUT") or str(ROOT / "runs" / "gpu")
    add("--out", default=out, help="folder of the JSON and the logs (or $OUT)")
    add("--wheels", type=Path, default=WHEELS, help="folder of wheels")
    add("--tiny", action="store_true", help="a rehearsal on a CPU")
    add("--batches", default="", help="comma-separated sequences of a decode")
    add("--sweep", action="store_true", help="int8 products in other tilings too")
    add("--skip-tests", action="store_true")
    add("--test-files", default=",".join(FILES), help="comma-separated")
    text = "fail in that row, to see what happens to the others"
    add("--rehearse", action="append", default=[], metavar="ROW=raise|die|hang", help=text)
    add("--row-limit-s", type=float, default=ROW_LIMIT_S)
    add("--start-limit-s", type=float, default=START_LIMIT_S)
    text = "measure nothing; print what this document of a run settles in the docs"
    add("--verdict", type=Path, metavar="FILE", help=text)
    return parser.parse_args()


def _size_of(args: argparse.Namespace) -> Size:
    size = TINY if args.tiny else FULL
    batches = tuple(int(part) for part in args.batches.split(",") if part)
    return replace(size, batches=batches or size.batches, sweeps=args.sweep)


def _interrupt(number: int, frame: Any) -> None:
    raise Interrupted


class _Run:
    """One run; its document gets the results."""

    def __init__(
        self, args: argparse.Namespace, size: Size, document: Document, scratch: Path, end: float
    ) -> None:
        self._args, self._size, self._document = args, size, document
        self._work, self._deadline = scratch / "work", end
        self._work.mkdir()
        self._num_children = 0
        self._environment = lay_out(scratch, args.wheels if args.wheels.is_dir() else None)
        if size.device == "cuda":
            # a test run sets this variable if it sees no GPU
            self._environment["TRITON_INTERPRET"] = "0"

    def all(self) -> None:
        """Run the tests and the rows, or note why not."""
        if lacks := missing(NEEDED, self._environment["PYTHONPATH"]):
            self._document.notes.append(f"{', '.join(lacks)} missing: {REMEDY}")
            print(self._document.notes[-1], flush=True)
            return
        if not self._args.skip_tests:
            self._test()
        for quantize, share in ((PLAIN, PLAIN_SHARE), (INT8, 1.0)):
            rows = rows_of(quantize, self._size.batches)
            deadline = time.monotonic() + share * self._left()
            while rows and deadline - time.monotonic() >= LEAST_S:
                rows = self._one_child(quantize, rows, deadline)
            for row in rows:
                self._document.add(row, DROPPED, why="no time was left to start")

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _test(self) -> None:
        if lacks := missing(FOR_TESTS, self._environment["PYTHONPATH"]):
            self._document.tests = {"failed": 1, "why": f"{', '.join(lacks)} missing: {REMEDY}"}
        else:
            files, limit_s = self._args.test_files.split(","), TESTS_SHARE * self._left()
            self._document.tests = run_tests(files, self._environment, self._work, limit_s)
        print(f"tests: {json.dumps(self._document.tests)}", flush=True)
        self._document.save()

    def _one_child(self, quantize: str, rows: list[Row], deadline: float) -> list[Row]:
        """Measure until a process ends; returns the remaining rows, which have no entry."""
        self._num_children += 1
        log = self._work / f"child-{self._num_children}.log"
        events = log.with_suffix(".jsonl")
        events.write_text("")
        order = {
            "size": asdict(self._size),
            "rows": [asdict(row) for row in rows],
            "deadline": deadline,
            "events": str(events),
            "rehearse": dict(one.rsplit("=", 1) for one in self._args.rehearse),
        }
        with _child(order, self._environment, log) as child:
            limits = Limits(self._args.start_limit_s, self._args.row_limit_s, self._deadline)
            watch = Watch(child, events, limits)
            pending = {row.id: row for row in rows}
            for event in watch.events():
                self._take(quantize, event, pending)
        failed = failed_with(watch, list(pending.values()))
        for row in failed:
            end = log.read_text("utf-8", "replace")[-LOG_BYTES:].strip()
            self._document.add(row, FAILED, error=f"{watch.why}\n{end}")
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
class Limits:
    """Seconds until a silent process is killed, in a start or build and in a row; and the end.

    deadline: of `time.monotonic()`, for all processes.
    """

    start_s: float
    row_s: float
    deadline: float


@dataclass(slots=True)
class Watch:
    """Reads a process's events as they come, and records why they ended."""

    child: subprocess.Popen[bytes]
    file: Path
    limits: Limits
    current: str | None = field(default=None, init=False)
    is_building: bool = field(default=False, init=False)
    num_rows: int = field(default=0, init=False)
    why: str = field(default="", init=False)

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield events until the process has ended, by itself or because it took too long."""
        limit = time.monotonic() + self.limits.start_s
        with self.file.open("r", encoding="utf-8") as stream:
            part = ""
            while True:
                has_ended = self.child.poll() is not None
                part += stream.read()
                *lines, part = part.split("\n")
                for line in lines:
                    event = json.loads(line)
                    limit = time.monotonic() + self._note(event)
                    yield event
                if has_ended:
                    self.why = self.why or f"the process ended with code {self.child.returncode}"
                    return
                if (now := time.monotonic()) > min(limit, self.limits.deadline):
                    is_over = now > self.limits.deadline
                    of = "the budget has" if is_over else "a row or a start may take"
                    self.why = f"ended: it took longer than {of}"
                    self.child.kill()
                    self.child.wait()
                time.sleep(POLL_S)

    def _note(self, event: dict[str, Any]) -> float:
        """Return the seconds until the next event is due."""
        self.is_building = event["event"] == "building"
        if event["event"] in ("building", "begin"):
            self.current = event["row"]
        elif event["event"] == "row":
            self.current = None
            self.num_rows += 1
        return self.limits.row_s if event["event"] == "begin" else self.limits.start_s


def failed_with(watch: Watch, pending: list[Row]) -> list[Row]:
    """The pending rows that failed with the process.

    A row whose runner cannot start or be built would fail the next time too.
    """
    current = [row for row in pending if row.id == watch.current]
    if current and watch.is_building:
        return [row for row in pending if row.mode == current[0].mode]
    return current if current or watch.num_rows else pending


@contextmanager
def _child(
    order: dict[str, Any], environment: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A measuring process, killed at the end of the block."""
    command = [sys.executable, "-m", "vlmserve.bench.gpu_bench.child"]
    with (
        log.open("wb") as out,
        subprocess.Popen(
            command, cwd=log.parent, env=environment, stdin=subprocess.PIPE, stdout=out, stderr=out
        ) as child,
    ):
        try:
            assert child.stdin is not None
            child.stdin.write(json.dumps(order).encode())
            child.stdin.close()
            yield child
        finally:
            child.kill()
