"""Offers a server twice what it can serve: those who are accepted must hardly notice."""

from __future__ import annotations

from typing import Any

import numpy as np

from processes import free_port, running, vlmserve_command
from vlmserve.server.bench.client import Client, Sample
from vlmserve.server.bench.load import request_bodies
from vlmserve.server.bench.runner import Run, run_level
from vlmserve.server.bench.settings import Level, Load

MODEL = "torture"
REFUSED = "HTTP 429"
WARM_UP_REQUESTS = 32
P99_RATIO, REFUSAL_P99_S, GOODPUT = 1.5, 0.05, 0.95


async def run_overload(
    seconds: float,
    max_queue_wait: float,
    max_num_seqs: int,
    max_tokens: int,
    seed: int,
    slack: float,
) -> tuple[dict[str, Any], list[str]]:
    """Measure the capacity, then offer 0.9 and 2 times as much; figures and broken promises."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    options = ["--served-model-name", MODEL, "--max-num-seqs", str(max_num_seqs)]
    options += ["--max-queue-wait", str(max_queue_wait), "--no-spare-engine"]
    command = vlmserve_command(None, port, "float32", *options)
    with running(command, f"{url}/v1/health/ready"):
        async with Client(f"{url}/v1") as client:
            await _offer(
                client, Level(concurrency=max_num_seqs), WARM_UP_REQUESTS, max_tokens, seed
            )
            pace = await _capacity(client, max_num_seqs, seconds / 3, max_tokens, seed + 1)
            runs = {}
            for number, factor in enumerate((0.9, 2.0)):
                level = Level(request_rate=factor * pace)
                count = int(factor * pace * seconds)
                runs[factor] = await _offer(client, level, count, max_tokens, seed + 2 + number)
    below, above = _summary(runs[0.9], pace), _summary(runs[2.0], pace)
    ratio = above["accepted_p99_s"] / below["accepted_p99_s"]
    figures = {
        "capacity_rps": round(pace, 2),
        "max_queue_wait_s": max_queue_wait,
        "max_num_seqs": max_num_seqs,
        "max_tokens": max_tokens,
        "at_0.9": below,
        "at_2": above,
        "p99_ratio": round(ratio, 3),
    }
    return figures, _broken(above, ratio, slack)


async def _capacity(
    client: Client, max_num_seqs: int, seconds: float, max_tokens: int, seed: int
) -> float:
    """Requests a second that are answered where some always wait."""
    guess = await _offer(client, Level(concurrency=max_num_seqs), 64, max_tokens, seed)
    count = max(64, int(seconds * len(guess.samples) / guess.seconds))
    # As many wait as run: answers of one length end together, and their places must be filled.
    run = await _offer(client, Level(2 * max_num_seqs), count, max_tokens, seed + 100)
    return sum(one.error is None for one in run.samples) / run.seconds


async def _offer(client: Client, level: Level, count: int, max_tokens: int, seed: int) -> Run:
    load = Load(count, max_tokens, num_images=1, image_pool=8, ignore_eos=True, seed=seed)
    return await run_level(client, request_bodies(load, MODEL), level, seed)


def _summary(run: Run, capacity: float) -> dict[str, Any]:
    accepted = [one for one in run.samples if one.error is None]
    refused = [one for one in run.samples if one.error == REFUSED]
    first, last = min(one.due for one in run.samples), max(one.due for one in run.samples)
    in_time = [one for one in accepted if one.end <= last]
    goodput = len(in_time) / (last - first)
    return {
        "offered": len(run.samples),
        "accepted": len(accepted),
        "refused": len(refused),
        "other_errors": len(run.samples) - len(accepted) - len(refused),
        "accepted_p50_s": _percentile(accepted, 50),
        "accepted_p99_s": _percentile(accepted, 99),
        "refused_p50_s": _percentile(refused, 50, from_sent=True),
        "refused_p99_s": _percentile(refused, 99, from_sent=True),
        "goodput_rps": round(goodput, 2),
        "goodput_of_capacity": round(goodput / capacity, 3),
    }


def _percentile(samples: list[Sample], rank: int, *, from_sent: bool = False) -> float | None:
    """Seconds from when each was due, or sent, to its end."""
    if not samples:
        return None
    spent = [one.end - (one.sent if from_sent else one.due) for one in samples]
    return round(float(np.percentile(spent, rank)), 4)


def _broken(above: dict[str, Any], ratio: float, slack: float) -> list[str]:
    broken = []
    if ratio > P99_RATIO * slack:
        broken.append(f"the accepted requests' p99 is {ratio:.2f} times that at 0.9, not 1.5")
    if above["refused_p99_s"] is None:
        broken.append("nothing was refused")
    elif above["refused_p99_s"] > REFUSAL_P99_S * slack:
        broken.append(f"refusals' p99 is {above['refused_p99_s'] * 1000:.0f} ms, not 50")
    if above["goodput_of_capacity"] < GOODPUT / slack:
        broken.append(f"goodput is {above['goodput_of_capacity']:.0%} of the capacity, not 95 %")
    if above["other_errors"]:
        broken.append(f"{above['other_errors']} requests failed otherwise")
    return broken
