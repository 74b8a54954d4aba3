"""What Ray Serve costs: the same load on the bare server and on one replica behind Ray's ingress.

    python bench/checkpoints.py m100 --out m100
    python bench/ray_overhead.py --model m100 --dtype bfloat16 --python build/ray/newest/bin/python

The two run in turn, each alone and started anew for every round; the client is the same. Each
figure is the median over the rounds. `--python` is an interpreter with `vlmserve[ray]`. The last
line is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from processes import arguments, free_port, numbers, print_document, running
from vlmserve.server.bench.client import Sample
from vlmserve.server.bench.settings import Level, Load, Sweep
from vlmserve.server.bench.summary import Summary, median_summary
from vlmserve.server.bench.sweep import run_sweep

KINDS = {"bare": [], "ray": ["--ray", "local"]}
FIGURES = ("tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "inter_token_p50_ms", "requests", "errors")


class Silent:
    """Shows no progress."""

    def start(self, level: Level, num_requests: int) -> None:
        """Do nothing."""

    def take(self, sample: Sample) -> None:
        """Do nothing."""

    def finish(self, summary: Summary) -> None:
        """Do nothing."""


def measure(kind: str, args: argparse.Namespace) -> list[Summary]:
    """One round of one kind: a figure for each level."""
    port = free_port()
    command = [args.python, "-m", "vlmserve.server", "serve", *([args.model] if args.model else [])]
    command += ["--port", str(port), "--dtype", args.dtype, "--served-model-name", "bench"]
    command += ["--no-log-requests", "--no-spare-engine", "--num-threads", str(args.threads)]
    command += KINDS[kind]
    url = f"http://127.0.0.1:{port}"
    sweep = Sweep(
        url=f"{url}/v1",
        model="bench",
        levels=[Level(concurrency=one) for one in numbers(args.concurrency)],
        num_requests=args.requests or None,
        load=Load(max_tokens=args.output_tokens, num_images=args.images),
    )
    # This working tree, whatever the interpreter has installed.
    package = Path(args.python).absolute().parents[2] / "package"
    variables = {"PYTHONPATH": str(package)} if package.is_dir() else {}
    variables |= {"RAY_USAGE_STATS_ENABLED": "0"}
    with running(command, f"{url}/v1/health/ready", os.environ | variables):
        return asyncio.run(run_sweep(sweep, Silent())).summaries


def rows_of(rounds: Sequence[dict[str, list[Summary]]]) -> list[dict[str, object]]:
    """For each level the figures of both."""
    rows = []
    for number, first in enumerate(rounds[0]["bare"]):
        row: dict[str, object] = {"concurrency": first.concurrency}
        medians = {kind: median_summary([one[kind][number] for one in rounds]) for kind in KINDS}
        for kind, figures in medians.items():
            row |= {f"{kind}_{name}": figures[name] for name in FIGURES}
        rows.append(row)
    return rows


def main() -> None:
    args = arguments(
        __doc__,
        model=("", "folder or hub id; default: the bundled model"),
        python=("python", "interpreter of an environment with vlmserve[ray]"),
        dtype="auto",
        concurrency="1,16,64",
        requests=(0, "a level; default: those of vlmserve bench serve"),
        output_tokens=64,
        images=0,
        rounds=3,
        threads=(len(os.sched_getaffinity(0)), "of the engine, in both"),
    )
    rounds: list[dict[str, list[Summary]]] = []
    for number in range(args.rounds):
        # The other first in every second round.
        order = list(KINDS)[:: 1 if number % 2 == 0 else -1]
        rounds.append({kind: measure(kind, args) for kind in order})
    rows = rows_of(rounds)
    print(
        f"{'clients':>8} {'server':>7} {'tokens/s':>9} {'ttft ms':>8} {'p99':>8} {'per token':>9}"
    )
    for row in rows:
        for kind in KINDS:
            shown = [row[f"{kind}_{name}"] for name in FIGURES[:4]]
            print(f"{row['concurrency']:>8} {kind:>7} {shown[0]:>9} {shown[1]:>8} {shown[2]:>8}"
                  f" {shown[3]:>9}")  # fmt: skip
    print_document(args, rows=rows)


if __name__ == "__main__":
    main()
