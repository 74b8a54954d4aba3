"""Runs a sweep: finds the model, warms up, then runs level after level.

Owns the order of the steps and the result document. Knows nothing of options or terminals.
"""

from __future__ import annotations

import math
import os
import platform
import resource
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from ... import __version__
from .client import Client, Sample
from .load import request_bodies
from .runner import run_level
from .settings import BenchError, Level, Load, Slo, Sweep
from .summary import Summary, summarize

# Default number of requests of a level: per concurrent request, or seconds of a request rate.
REQUESTS_A_USER = 4
SECONDS_OF_A_RATE = 30.0
MIN_REQUESTS = 8
WARM_UP_TOKENS = 8
WARM_UP_CONCURRENCY = 2
# Added to the seed, so that no level repeats a picture of another.
WARM_UP_SEED = 1_000_003
PROBE_SEED = 2_000_003


class Watcher(Protocol):
    """Receives the progress of a sweep."""

    def start(self, level: Level, num_requests: int) -> None:
        """A level starts."""

    def take(self, sample: Sample) -> None:
        """One of its requests ended."""

    def finish(self, summary: Summary) -> None:
        """The level has ended."""


@dataclass(slots=True)
class Result:
    """A sweep's figures, and what the sweep found out about the server."""

    model: str
    is_eos_ignored: bool
    started: str
    summaries: list[Summary]

    def document(self, sweep: Sweep, command: str) -> dict[str, object]:
        """The result as a JSON document: figures, load, client and command."""
        load = asdict(replace(sweep.load, ignore_eos=self.is_eos_ignored))
        del load["num_requests"]  # each level has its own
        return {
            "vlmserve": __version__,
            "url": sweep.url,
            "model": self.model,
            "started": self.started,
            "command": command,
            "client": client_machine(),
            "load": load | {"num_warm_up": sweep.num_warm_up},
            "slo": asdict(sweep.slo),
            "levels": [asdict(summary) for summary in self.summaries],
        }


async def run_sweep(sweep: Sweep, watcher: Watcher) -> Result:
    """Run every level in order.

    Raises BenchError if the server does not answer, or if every request of the warm-up fails.
    """
    _allow_many_connections()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    async with Client(sweep.url, sweep.api_key, sweep.timeout_s) as client:
        model = sweep.model or await _only_model(client, sweep.url)
        is_eos_ignored = await _takes_ignore_eos(client, model, sweep)
        load = replace(sweep.load, ignore_eos=is_eos_ignored)
        await warm_up(client, load, model, sweep.num_warm_up)
        summaries = []
        for number, level in enumerate(sweep.levels):
            load = replace(
                load,
                num_requests=sweep.num_requests or default_requests(level),
                seed=sweep.load.seed + number,
            )
            watcher.start(level, load.num_requests)
            summaries.append(await run_load(client, load, level, model, sweep.slo, watcher.take))
            watcher.finish(summaries[-1])
    return Result(model, is_eos_ignored, started, summaries)


async def run_load(
    client: Client,
    load: Load,
    level: Level,
    model: str,
    slo: Slo | None = None,
    on_sample: Callable[[Sample], None] = lambda sample: None,
) -> Summary:
    """Run one level: draw its bodies, send them, summarize."""
    bodies = request_bodies(load, model)
    run = await run_level(client, bodies, level, load.seed, on_sample)
    return summarize(level, run, load.max_tokens, slo)


async def warm_up(client: Client, load: Load, model: str, count: int) -> None:
    """Send a few short requests with pictures of their own; raises BenchError if all fail."""
    if count == 0:
        return
    short = replace(
        load,
        num_requests=count,
        max_tokens=min(WARM_UP_TOKENS, load.max_tokens),
        seed=load.seed + WARM_UP_SEED,
    )
    bodies = request_bodies(short, model)
    run = await run_level(client, bodies, Level(concurrency=WARM_UP_CONCURRENCY))
    failed = [sample for sample in run.samples if sample.error is not None]
    if len(failed) == len(run.samples):
        raise BenchError(
            f"every request of the warm-up failed: {failed[0].error}: {failed[0].detail}"
        )


def default_requests(level: Level) -> int:
    """Requests of a level for which no number was given."""
    if level.request_rate is not None:
        return max(MIN_REQUESTS, math.ceil(level.request_rate * SECONDS_OF_A_RATE))
    return max(MIN_REQUESTS, REQUESTS_A_USER * (level.concurrency or 1))


async def _only_model(client: Client, url: str) -> str:
    names = await client.model_names()
    if len(names) != 1:
        known = ", ".join(names[:8]) or "none"
        raise BenchError(f"{url} serves {known}: name one with --model")
    return names[0]


async def _takes_ignore_eos(client: Client, model: str, sweep: Sweep) -> bool:
    """Whether to send ignore_eos; "auto" asks the server with one short request."""
    if sweep.ignore_eos != "auto":
        return sweep.ignore_eos == "on"
    load = replace(sweep.load, num_requests=1, max_tokens=1, seed=sweep.load.seed + PROBE_SEED)
    (body,) = request_bodies(replace(load, ignore_eos=True), model)
    sample = await client.chat(body)
    return sample.error not in ("HTTP 400", "HTTP 422")


def _allow_many_connections() -> None:
    """Raise the limit of file descriptors: an open loop needs one per request."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def client_machine() -> dict[str, object]:
    """The machine that sent the load."""
    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }


def processor_name() -> str:
    """The processor as Linux names it."""
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
