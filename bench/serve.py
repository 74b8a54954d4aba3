"""Measures a server: tokens/s, TTFT and inter-token time by concurrency.

    python bench/serve.py --spawn --concurrency 1,4,16          # the bundled model
    python bench/serve.py --url http://127.0.0.1:8000/v1 --model NAME

The last line printed is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import asdict

from load import Load, Summary, run_load
from processes import free_port, machine, running, vlmserve_command

MODEL_NAME = "bench"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--url", help="base URL of a running server, ending in /v1")
    target.add_argument("--spawn", action="store_true", help="start vlmserve for this run")
    parser.add_argument("--model", help="with --url its model name; with --spawn a folder")
    parser.add_argument("--dtype", default="auto", help="with --spawn")
    parser.add_argument("--concurrency", default="1,4,16", help="comma-separated levels")
    parser.add_argument("--requests", type=int, default=0, help="a level; 0: four a client, min 8")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=224, help="side in pixels; 0: no image")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def make_load(args: argparse.Namespace, concurrency: int, seed: int) -> Load:
    size = (args.image_size, args.image_size) if args.image_size else None
    count = args.requests or max(8, 4 * concurrency)
    return Load(concurrency, count, args.max_tokens, size, seed)


def measure(url: str, model: str, args: argparse.Namespace) -> list[Summary]:
    """A warm-up, then every level once, each with pictures of its own."""
    asyncio.run(run_load(url, Load(2, 4, 8, (224, 224), args.seed + 999), model))
    summaries = []
    for level, concurrency in enumerate(int(c) for c in args.concurrency.split(",")):
        load = make_load(args, concurrency, args.seed + level)
        summaries.append(asyncio.run(run_load(url, load, model)))
        print_row(summaries[-1])
    return summaries


def print_row(summary: Summary) -> None:
    print(
        f"{summary.concurrency:>4} at once: {summary.tokens_per_s:8.1f} tokens/s, "
        f"TTFT {summary.ttft_p50_ms:.0f} ms, inter-token {summary.inter_token_p50_ms:.1f} ms, "
        f"{summary.errors} errors",
        flush=True,
    )


def main() -> None:
    args = parse_arguments()
    if args.url:
        summaries = measure(args.url, args.model, args)
    else:
        port = free_port()
        command = vlmserve_command(args.model, port, args.dtype, "--served-model-name", MODEL_NAME)
        with running(command, f"http://127.0.0.1:{port}/v1/health/ready"):
            summaries = measure(f"http://127.0.0.1:{port}/v1", MODEL_NAME, args)
    document = {"machine": machine(), "dtype": args.dtype, "levels": [asdict(s) for s in summaries]}
    print(json.dumps(document))


if __name__ == "__main__":
    main()
