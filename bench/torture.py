"""Tortures a real server and counts what its clients lose. Each part prints a JSON document last.

    python bench/torture.py kills --count 200        # kill engines under load
    python bench/torture.py cancels --count 100000   # clients disconnect at any moment
    python bench/torture.py overload                 # 0.9 and 2 times the server's capacity
    python bench/torture.py neighbours               # one API key attacks, another asks

The server runs the bundled model. A part fails (exit code 1) if it breaks a promise of
docs/reliability.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys

from processes import add_options, machine
from torture_cancels import run_cancels
from torture_kills import run_kills
from torture_neighbours import run_neighbours
from torture_overload import run_overload

SLACK = 1.0, "multiplies the promised seconds"
RUNS = {
    "kills": run_kills,
    "cancels": run_cancels,
    "overload": run_overload,
    "neighbours": run_neighbours,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parts = parser.add_subparsers(dest="part", required=True)
    engines = ["bundled", "hashing"]
    add_options(
        parts.add_parser("kills"), count=200, clients=16, engine=engines, seed=0, slack=SLACK
    )
    add_options(parts.add_parser("cancels"), count=2000, clients=16, seed=0)
    add_options(
        parts.add_parser("overload"),
        seconds=(60.0, "of each of the loads"),
        max_queue_wait=0.5,
        max_num_seqs=8,
        max_tokens=64,
        seed=0,
        slack=SLACK,
    )
    add_options(
        parts.add_parser("neighbours"),
        attacks=("", "comma-separated names; default: all"),
        size=(1.0, "of each attack; 1 is its full size"),
        count=(20, "requests of the neighbour, alone and beside"),
        checkpoint=("", "served instead of the bundled model"),
        dtype="float32",
        seed=0,
        slack=SLACK,
    )
    args = vars(parser.parse_args())
    part = args.pop("part")
    figures, broken = asyncio.run(RUNS[part](**args))
    for promise in broken:
        print(f"broken: {promise}", file=sys.stderr)
    print(json.dumps({"part": part, **figures, "broken": broken, "machine": machine()}))
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
