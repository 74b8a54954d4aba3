"""Hurts a real server and counts what its clients lose. Each part's last line is one JSON document.

    python bench/torture.py kills --count 200        # engines killed under load
    python bench/torture.py cancels --count 100000   # clients that leave, at any moment
    python bench/torture.py overload                 # 0.9 and 2 times what the server can serve

The server is the bundled model's, started for the run. A part fails (exit code 1) where a promise
of docs/reliability.md is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys

from processes import machine
from torture_cancels import run_cancels
from torture_kills import run_kills
from torture_overload import run_overload


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parts = parser.add_subparsers(dest="part", required=True)
    kills = parts.add_parser("kills")
    kills.add_argument("--count", type=int, default=200)
    kills.add_argument("--clients", type=int, default=16)
    kills.add_argument("--engine", choices=("bundled", "hashing"), default="bundled")
    kills.add_argument("--seed", type=int, default=0)
    cancels = parts.add_parser("cancels")
    cancels.add_argument("--count", type=int, default=2000)
    cancels.add_argument("--clients", type=int, default=16)
    cancels.add_argument("--seed", type=int, default=0)
    overload = parts.add_parser("overload")
    overload.add_argument("--seconds", type=float, default=60.0, help="of each of the loads")
    overload.add_argument("--max-queue-wait", type=float, default=0.5)
    overload.add_argument("--max-num-seqs", type=int, default=8)
    overload.add_argument("--max-tokens", type=int, default=64)
    overload.add_argument("--seed", type=int, default=0)
    for one in (kills, overload):
        one.add_argument("--slack", type=float, default=1.0, help="times the promised seconds")
    args = vars(parser.parse_args())
    part = args.pop("part")
    runs = {"kills": run_kills, "cancels": run_cancels, "overload": run_overload}
    figures, broken = asyncio.run(runs[part](**args))
    for promise in broken:
        print(f"broken: {promise}", file=sys.stderr)
    print(json.dumps({"part": part, **figures, "broken": broken, "machine": machine()}))
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
