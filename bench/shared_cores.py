"""Times decode steps while another process takes a core, against the same steps without it.

    python bench/checkpoints.py m100 --out m100
    python bench/shared_cores.py --checkpoint m100 --dtype bfloat16

Each round measures every level three times: alone, beside a process that computes without a pause,
with all threads as if that were not there, and beside it with the threads that the runner chooses
(`models/execution/shared_cores.py`). Figures are tokens/s; the parts of the quiet figure are
medians over the rounds. This script starts and ends the process. Prints one JSON document last.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import torch

from decode import Level, Run, make_levels, make_runner
from processes import BUNDLED, arguments, print_document
from vlmserve.models.execution.shared_cores import SharedCores

ALONE, FIXED, CHOSEN = "alone", "all threads", "chosen threads"


def parse_arguments() -> argparse.Namespace:
    return arguments(
        __doc__,
        checkpoint=BUNDLED,
        dtype="auto",
        device="cpu",
        sequences=("1,16", "comma-separated, of a decode"),
        prefills="",
        context=(48, "tokens before the decoded token"),
        prompt=(17, "tokens of a prefilled prompt"),
        tiles=("", "comma-separated, of a prefilled prompt's image; default: all"),
        rounds=5,
        seconds=(4.0, "of each measurement, after the same time to settle"),
    )


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    """Another process that computes without a pause, on any core."""
    command = [sys.executable, "-c", "while True: pass"]
    process = subprocess.Popen(command)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def steps_per_s(run: Run, level: Level, seconds: float) -> float:
    """Steps of a level a second, measured after as long a time that is not counted."""
    runner, _ = run
    for _ in range(2):
        count, start = 0, time.monotonic()
        while (passed := time.monotonic() - start) < seconds:
            runner.execute(level.batch)
            count += 1
    return count / passed


def measure(run: Run, level: Level, cores: SharedCores, seconds: float) -> dict[str, float]:
    """Tokens/s alone, beside a busy process with all threads, and with those that are chosen."""
    runner, _ = run
    rates = {}
    for name in (ALONE, FIXED, CHOSEN):
        runner.cores = cores if name == CHOSEN else None
        with contextlib.nullcontext() if name == ALONE else busy_process():
            rates[name] = level.num_seqs * steps_per_s(run, level, seconds)
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    return rates


def main() -> None:
    args = parse_arguments()
    runner = make_runner(args, args.checkpoint)
    if runner.cores is None:
        raise SystemExit("the threads are chosen already: unset OMP_NUM_THREADS; one core is none")
    cores, run = runner.cores, (runner, make_levels(runner, args))
    rounds: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(args.rounds):
        for level in run[1]:
            key = level.kind, level.num_seqs
            rounds.setdefault(key, []).append(measure(run, level, cores, args.seconds))
    rows = []
    for (kind, count), found in rounds.items():
        part = {
            name: statistics.median(one[name] / one[ALONE] for one in found)
            for name in (FIXED, CHOSEN)
        }
        alone = statistics.median(one[ALONE] for one in found)
        print(
            f"{kind:<16}{count:>4}: {alone:8.1f} tokens/s alone; beside a busy process"
            f" {part[FIXED]:.2f} of it with all threads, {part[CHOSEN]:.2f} with chosen ones"
        )
        row = {"step": kind, "sequences": count, "tokens_per_s_alone": round(alone, 2)}
        rows.append(row | {name: round(value, 3) for name, value in part.items()})
    print_document(args, model=args.checkpoint or "bundled", dtype=runner.info.dtype, rows=rows)


if __name__ == "__main__":
    main()
