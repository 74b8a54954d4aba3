"""Offers the same load to this server and to another, in alternating runs.

    pip install -r requirements/bench.txt
    python bench/checkpoints.py m100 --out m100
    python bench/peers.py --checkpoint m100 --concurrency 1,4,16,64 --runs 3
    python bench/peers.py --checkpoint m100 --peer-url http://127.0.0.1:8301 --peer-model NAME

The other is `transformers serve` with the same checkpoint, dtype and number of threads, or any
server that runs already and speaks OpenAI's chat completions. Both stay up and take turns, so other
work on the machine slows both. Some servers use a part of a core while they are idle: with
--peer-pid the other is stopped during this one's turns. A level has a ratio only if every answer of
both servers has the requested length. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from processes import BIN, arguments, free_port, numbers, print_document, running, serving, stopped
from server_state import descendants
from vlmserve.server.bench.client import Client
from vlmserve.server.bench.settings import Level, Load
from vlmserve.server.bench.summary import Summary, median_summary
from vlmserve.server.bench.sweep import run_load, warm_up

WARM_UP_REQUESTS = 4
OURS, TRANSFORMERS = "vlmserve", "transformers serve"

Results = dict[str, dict[int, list[Summary]]]


async def measure(servers: dict[str, tuple[str, str]], args: argparse.Namespace) -> Results:
    """servers: name -> (url, model). Every level: a turn for each server, `runs` times."""
    results: Results = {name: {} for name in servers}
    peer = [args.peer_pid, *descendants(args.peer_pid)] if args.peer_pid else []
    sizes = ((args.image_size, args.image_size),)
    load = Load(
        WARM_UP_REQUESTS,
        args.max_tokens,
        num_images=args.images,
        image_sizes=sizes,
        ignore_eos=args.ignore_eos,
        seed=args.seed,
    )
    for url, model in servers.values():
        async with Client(url) as client:
            await warm_up(client, load, model, load.num_requests)
    seed = args.seed
    for concurrency in numbers(args.concurrency):
        for _ in range(args.runs):
            seed += 1
            count = args.requests or max(6, 2 * concurrency)
            load = replace(load, num_requests=count, seed=seed)
            level = Level(concurrency=concurrency)
            for name, (url, model) in servers.items():
                with stopped(peer if name == OURS else []):
                    async with Client(url) as client:
                        run = await run_load(client, load, level, model)
                results[name].setdefault(concurrency, []).append(run)
                print(
                    f"{concurrency:>4} at once, {name:>18}: {run.tokens_per_s:8.1f} tokens/s, TTFT "
                    f"p50 {run.ttft_p50_ms} ms, lengths {run.output_lengths}, {run.errors} errors",
                    flush=True,
                )
    return results


def report(results: Results) -> list[dict[str, object]]:
    """A row a level: medians of both servers, and the median ratio of the paired runs."""
    ours, theirs = results
    pairs = ((level, mine, results[theirs][level]) for level, mine in results[ours].items())
    return [
        {
            "concurrency": level,
            "tokens_per_s_ratio": ratio(mine, other),
            ours: median_summary(mine),
            theirs: median_summary(other),
        }
        for level, mine, other in pairs
    ]


def ratio(mine: list[Summary], other: list[Summary]) -> float | None:
    """The median ratio of paired runs; None if an answer failed or has another length."""
    if not all(run.is_equal_length and not run.errors for run in [*mine, *other]):
        return None
    ratios = (a.tokens_per_s / b.tokens_per_s for a, b in zip(mine, other, strict=True))
    return round(statistics.median(ratios), 3)


@contextlib.contextmanager
def _peer(url: str, checkpoint: str, dtype: str) -> Iterator[str]:
    """The URL of the other server; without one, of `transformers serve` while the block runs."""
    if url:
        yield url
        return
    url = f"http://127.0.0.1:{(port := free_port())}"
    # Without --continuous-batching: for this architecture both forms run one request at a time.
    command = [str(BIN / "transformers"), "serve", checkpoint, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", dtype, "--device", "cpu"]
    with running(command, f"{url}/health"):
        yield url


def main() -> None:
    args = arguments(
        __doc__,
        checkpoint=(..., "folder; see checkpoints.py"),
        peer_url=("", "a server that runs already, without /v1; default: transformers serve"),
        peer_pid=(0, "its process, to stop it during the other's turns"),
        peer_model=("", "its model's name; default: the checkpoint's folder"),
        images=(1, "a request; 0: text only"),
        ignore_eos=(False, "ask both to continue each answer to max_tokens"),
        concurrency="1,4,16,64",
        runs=(3, "alternating runs of each level"),
        requests=(0, "a run; 0: twice the level, at least 6"),
        max_tokens=64,
        image_size=224,
        dtype="bfloat16",
        seed=0,
    )
    checkpoint = str(Path(args.checkpoint).resolve())
    os.environ["HF_HUB_OFFLINE"] = "1"
    with (
        serving(checkpoint, args.dtype) as (_, url),
        _peer(args.peer_url, checkpoint, args.dtype) as peer_url,
    ):
        name = args.peer_model or checkpoint
        servers = {
            OURS: (f"{url}/v1", "bench"),
            args.peer_url or TRANSFORMERS: (f"{peer_url}/v1", name),
        }
        levels = report(asyncio.run(measure(servers, args)))
    print_document(args, levels=levels)


if __name__ == "__main__":
    main()
