"""The same load on this server and on `transformers serve`, in alternating runs.

    python bench/checkpoints.py m100 --out m100
    python bench/peers.py --checkpoint m100 --concurrency 1,16 --runs 3

Same checkpoint, dtype and number of threads; both servers stay up through the run
and take turns, so that the machine's mood falls on both. Needs the packages of
requirements/bench.txt. The last line printed is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from pathlib import Path

from load import Load, Summary, median_summaries, run_load
from processes import BIN, free_port, machine, running, vlmserve_command

Results = dict[str, dict[int, list[Summary]]]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--checkpoint", required=True, help="folder; see checkpoints.py")
    parser.add_argument("--concurrency", default="1,16")
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
        asyncio.run(run_load(url, Load(2, 4, 16, (224, 224), args.seed + 10_000), model))
    seed = args.seed
    for concurrency in (int(c) for c in args.concurrency.split(",")):
        for _ in range(args.runs):
            seed += 1
            for name, (url, model) in servers.items():
                summary = asyncio.run(run_load(url, make_load(args, concurrency, seed), model))
                results[name].setdefault(concurrency, []).append(summary)
                print(
                    f"{concurrency:>4} at once, {name:>18}: {summary.tokens_per_s:8.1f} tokens/s, "
                    f"TTFT p50 {summary.ttft_p50_ms:.0f} ms, lengths {summary.output_lengths}",
                    flush=True,
                )
    return results


def make_load(args: argparse.Namespace, concurrency: int, seed: int) -> Load:
    count = args.requests or max(6, 2 * concurrency)
    return Load(concurrency, count, args.max_tokens, (args.image_size, args.image_size), seed)


def report(results: Results) -> list[dict[str, object]]:
    """A row a level: medians of both servers, and the median ratio of the paired runs."""
    rows: list[dict[str, object]] = []
    ours, theirs = results["vlmserve"], results["transformers serve"]
    for concurrency, mine in ours.items():
        other = theirs[concurrency]
        ratios = sorted(a.tokens_per_s / b.tokens_per_s for a, b in zip(mine, other, strict=True))
        rows.append(
            {
                "concurrency": concurrency,
                "tokens_per_s_ratio": round(ratios[len(ratios) // 2], 3),
                "vlmserve": median_summaries(mine),
                "transformers serve": median_summaries(other),
            }
        )
    return rows


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
