"""Offers a load to an OpenAI-compatible server and measures what a client sees.

Owns requests and clocks. Knows nothing of how the server works: only HTTP.
Every picture is drawn anew from the seed, so that no cache can win by repetition.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

import httpx2
import numpy

from vlmserve.models.bundled.pictures import data_url, draw, random_scene

QUESTION = "What is in this image?"


@dataclass(slots=True, frozen=True)
class Load:
    """What is sent: `num_requests` greedy streams, at most `concurrency` open at a time."""

    concurrency: int
    num_requests: int
    max_tokens: int
    image_size: tuple[int, int] | None
    seed: int


@dataclass(slots=True)
class Sample:
    """One request as its client saw it; times in seconds from its sending."""

    chunk_times: list[float] = field(default_factory=list)
    end: float = 0.0
    completion_tokens: int = 0
    error: str | None = None


@dataclass(slots=True)
class Summary:
    """Figures of one load; times in milliseconds."""

    concurrency: int
    requests: int
    errors: int
    output_tokens: int
    seconds: float
    tokens_per_s: float
    requests_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    inter_token_p50_ms: float
    inter_token_p99_ms: float
    end_to_end_p50_ms: float
    end_to_end_p99_ms: float
    output_lengths: list[int]


def unique_pictures(size: tuple[int, int], seed: int) -> Iterator[str]:
    """Endless data URLs of PNGs, no two alike: a scene each, and noise in one row."""
    rng = numpy.random.default_rng(seed)
    while True:
        image = draw(random_scene(rng, size=size))
        for column in range(8):
            image.putpixel((column, 0), tuple(int(v) for v in rng.integers(0, 256, 3)))
        yield data_url(image, "PNG")


def request_bodies(load: Load, model: str) -> list[dict[str, object]]:
    """The load's request bodies, drawn before the clock starts."""
    pictures = unique_pictures(load.image_size, load.seed) if load.image_size else None
    return [
        _body(load, model, next(pictures) if pictures else None) for _ in range(load.num_requests)
    ]


def _body(load: Load, model: str, picture: str | None) -> dict[str, object]:
    content: list[dict[str, object]] = [{"type": "text", "text": QUESTION}]
    if picture is not None:
        content.insert(0, {"type": "image_url", "image_url": {"url": picture}})
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": load.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def run_load(url: str, load: Load, model: str) -> Summary:
    """Send the load to url (…/v1) and sum up what came back."""
    bodies = iter(request_bodies(load, model))
    samples: list[Sample] = []
    timeout = httpx2.Timeout(600.0)
    limits = httpx2.Limits(max_connections=load.concurrency)
    async with httpx2.AsyncClient(timeout=timeout, limits=limits, trust_env=False) as client:

        async def worker() -> None:
            for body in bodies:
                samples.append(await _stream(client, f"{url}/chat/completions", body))

        start = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(load.concurrency)))
        seconds = time.perf_counter() - start
    return summarize(load, samples, seconds)


async def _stream(client: httpx2.AsyncClient, url: str, body: dict[str, object]) -> Sample:
    sample = Sample()
    start = time.perf_counter()
    try:
        async with client.stream("POST", url, json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                sample.error = f"{response.status_code}: {text[:200]}"
                return sample
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    _take(sample, json.loads(line[6:]), time.perf_counter() - start)
    except (httpx2.HTTPError, ValueError) as error:
        sample.error = f"{type(error).__name__}: {error}"
    sample.end = time.perf_counter() - start
    return sample


def _take(sample: Sample, chunk: dict[str, object], now: float) -> None:
    """Note the time of a chunk with text, and the usage where a chunk carries it."""
    if chunk.get("error"):
        sample.error = str(chunk["error"])
    for choice in chunk.get("choices") or ():
        if (choice.get("delta") or {}).get("content"):
            sample.chunk_times.append(now)
    if usage := chunk.get("usage"):
        sample.completion_tokens = int(usage["completion_tokens"])


def summarize(load: Load, samples: Sequence[Sample], seconds: float) -> Summary:
    """Percentiles over the requests that succeeded."""
    good = [s for s in samples if s.error is None and s.chunk_times]
    for sample in samples:
        if sample.error:
            sys.stderr.write(f"request failed: {sample.error}\n")
    tokens = sum(s.completion_tokens for s in good)
    ttft = [s.chunk_times[0] for s in good]
    gaps = [b - a for s in good for a, b in zip(s.chunk_times, s.chunk_times[1:], strict=False)]
    ends = [s.end for s in good]
    return Summary(
        concurrency=load.concurrency,
        requests=len(good),
        errors=len(samples) - len(good),
        output_tokens=tokens,
        seconds=round(seconds, 3),
        tokens_per_s=round(tokens / seconds, 2),
        requests_per_s=round(len(good) / seconds, 3),
        ttft_p50_ms=percentile(ttft, 50),
        ttft_p99_ms=percentile(ttft, 99),
        inter_token_p50_ms=percentile(gaps, 50),
        inter_token_p99_ms=percentile(gaps, 99),
        end_to_end_p50_ms=percentile(ends, 50),
        end_to_end_p99_ms=percentile(ends, 99),
        output_lengths=sorted({s.completion_tokens for s in good}),
    )


def percentile(values: Sequence[float], rank: int) -> float:
    """The rank-th percentile in milliseconds, 0.0 of nothing."""
    return round(1000 * float(numpy.percentile(values, rank)), 3) if values else 0.0


def median_summaries(runs: Sequence[Summary]) -> dict[str, object]:
    """The median of each figure over alternating runs of one load."""
    rows = [asdict(run) for run in runs]
    merged: dict[str, object] = {}
    for key, first in rows[0].items():
        if key == "output_lengths":
            merged[key] = sorted({length for row in rows for length in row[key]})
        elif isinstance(first, float):
            merged[key] = round(statistics.median(row[key] for row in rows), 3)
        else:
            merged[key] = sum(row[key] for row in rows) if key != "concurrency" else first
    merged["runs"] = len(rows)
    return merged
