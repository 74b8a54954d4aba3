"""The same load on this server and on `transformers serve`, in alternating runs.

    pip install -r requirements/bench.txt
    python bench/checkpoints.py m100 --out m100
    python bench/peers.py --checkpoint m100 --concurrency 1,4,16,64 --runs 3

Same checkpoint, dtype and number of threads; both servers stay up through the run and take turns,
so that the machine's mood falls on both. A level has a ratio only if every answer of both servers
has the length that was asked for. The last line printed is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
from pathlib import Path

from processes import BIN, free_port, machine, running, vlmserve_command
from vlmserve.server.bench.client import Client
from vlmserve.server.bench.settings import Level, Load
from vlmserve.server.bench.summary import Summary, median_summary
from vlmserve.server.bench.sweep import run_load, warm_up

WARM_UP_REQUESTS = 4

Results = dict[str, dict[int, list[Summary]]]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--checkpoint", required=True, help="folder; see checkpoints.py")
    parser.add_argument("--concurrency", default="1,4,16,64")
    parser.add_argument("--runs", type=int, default=3, help="alternating runs of each level")
    parser.add_argument("--requests", type=int, default=0, help="a run; 0: twice the level, min 6")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def peer_command(checkpoint: str, port: int, dtype: str) -> list[str]:
    """`transformers serve` with the checkpoint loaded at start.

    --continuous-batching is left out: for this architecture it falls back to one
    request at a time, as without it.
    """
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--device", "cpu"]
    return [str(BIN / "transformers"), "serve", checkpoint, *options]


def measure(servers: dict[str, tuple[str, str]], args: argparse.Namespace) -> Results:
    """servers: name -> (url, model). Every level: a turn for each server, `runs` times."""
    results: Results = {name: {} for name in servers}
    for name, (url, model) in servers.items():
        print(f"warming up {name}", flush=True)
        asyncio.run(warm(url, model, make_load(args, WARM_UP_REQUESTS, args.seed)))
    seed = args.seed
    for concurrency in (int(c) for c in args.concurrency.split(",")):
        for _ in range(args.runs):
            seed += 1
            load = make_load(args, args.requests or max(6, 2 * concurrency), seed)
            for name, (url, model) in servers.items():
                summary = asyncio.run(offer(url, model, load, concurrency))
                results[name].setdefault(concurrency, []).append(summary)
                print(
                    f"{concurrency:>4} at once, {name:>18}: {summary.tokens_per_s:8.1f} tokens/s, "
                    f"TTFT p50 {summary.ttft_p50_ms} ms, lengths {summary.output_lengths}, "
                    f"{summary.errors} errors",
                    flush=True,
                )
    return results


def make_load(args: argparse.Namespace, count: int, seed: int) -> Load:
    sizes = ((args.image_size, args.image_size),)
    return Load(count, max_tokens=args.max_tokens, image_sizes=sizes, seed=seed)


async def warm(url: str, model: str, load: Load) -> None:
    async with Client(url) as client:
        await warm_up(client, load, model, load.num_requests)


async def offer(url: str, model: str, load: Load, concurrency: int) -> Summary:
    async with Client(url) as client:
        return await run_load(client, load, Level(concurrency=concurrency), model)


def report(results: Results) -> list[dict[str, object]]:
    """A row a level: medians of both servers, and the median ratio of the paired runs."""
    rows: list[dict[str, object]] = []
    ours, theirs = results["vlmserve"], results["transformers serve"]
    for concurrency, mine in ours.items():
        other = theirs[concurrency]
        rows.append(
            {
                "concurrency": concurrency,
                "tokens_per_s_ratio": ratio(mine, other),
                "vlmserve": median_summary(mine),
                "transformers serve": median_summary(other),
            }
        )
    return rows


def ratio(mine: list[Summary], other: list[Summary]) -> float | None:
    """The median ratio of paired runs; None where an answer failed or has another length."""
    if not all(run.is_equal_length and not run.errors for run in [*mine, *other]):
        return None
    ratios = (a.tokens_per_s / b.tokens_per_s for a, b in zip(mine, other, strict=True))
    return round(statistics.median(ratios), 3)


def main() -> None:
    args = parse_arguments()
    checkpoint = str(Path(args.checkpoint).resolve())
    port, peer_port = free_port(), free_port()
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    ours = vlmserve_command(checkpoint, port, args.dtype, "--served-model-name", "bench")
    with (
        running(ours, f"http://127.0.0.1:{port}/v1/health/ready", env),
        running(
            peer_command(checkpoint, peer_port, args.dtype),
            f"http://127.0.0.1:{peer_port}/health",
            env,
        ),
    ):
        servers = {
            "vlmserve": (f"http://127.0.0.1:{port}/v1", "bench"),
            "transformers serve": (f"http://127.0.0.1:{peer_port}/v1", checkpoint),
        }
        rows = report(measure(servers, args))
    print(json.dumps({"machine": machine(), "dtype": args.dtype, "levels": rows}))


if __name__ == "__main__":
    main()
