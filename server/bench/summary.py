"""Summarizes samples: percentiles, rates, errors by kind, and goodput at an SLO.

Owns the definitions of the figures. Latencies count from when a request was due. Rates count
successful requests over the whole time of the level; failed requests count as errors only.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from .client import Sample
from .runner import Run
from .settings import Level, Slo


@dataclass(slots=True)
class Summary:
    """Figures of one level; None where nothing was measured.

    requests: successful requests. inter_token: between two pieces of one answer. output_lengths:
    every length that occurred. is_equal_length: every answer has the requested length.
    goodput_per_s: requests per second within the SLO. client_cpu: the client's share of one core.
    send_lag: delay between a request's due time and its sending.
    """

    concurrency: int | None
    request_rate: float | None
    requests: int
    errors: int
    errors_by_kind: dict[str, int]
    seconds: float
    prompt_tokens: int
    output_tokens: int
    output_lengths: list[int]
    is_equal_length: bool
    is_counted_by_server: bool
    tokens_per_s: float
    requests_per_s: float
    goodput_per_s: float | None
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    inter_token_p50_ms: float | None
    inter_token_p99_ms: float | None
    end_to_end_p50_ms: float | None
    end_to_end_p99_ms: float | None
    send_lag_p99_ms: float | None
    client_cpu: float


def ttft_s(sample: Sample) -> float | None:
    """Seconds from when the request was due to its first text."""
    return sample.chunk_times[0] - sample.due if sample.chunk_times else None


def mean_inter_token_s(sample: Sample) -> float | None:
    """Seconds per token after the first; None below two tokens or two pieces."""
    if len(sample.chunk_times) < 2 or sample.completion_tokens < 2:
        return None
    return (sample.chunk_times[-1] - sample.chunk_times[0]) / (sample.completion_tokens - 1)


def summarize(level: Level, run: Run, max_tokens: int, slo: Slo | None = None) -> Summary:
    """The figures of a level's run. max_tokens: the requested length."""
    good = [sample for sample in run.samples if sample.error is None]
    kinds = Counter(sample.error for sample in run.samples if sample.error is not None)
    times = [sample.chunk_times for sample in good]
    ttft = [value for value in map(ttft_s, good) if value is not None]
    gaps = [b - a for t in times for a, b in itertools.pairwise(t)]
    ends = [sample.end - sample.due for sample in good]
    lags = [sample.sent - sample.due for sample in run.samples]
    tokens = sum(sample.completion_tokens for sample in good)
    lengths = sorted({sample.completion_tokens for sample in good})
    return Summary(
        concurrency=level.concurrency,
        request_rate=level.request_rate,
        requests=len(good),
        errors=kinds.total(),
        errors_by_kind=dict(kinds.most_common()),
        seconds=round(run.seconds, 3),
        prompt_tokens=sum(sample.prompt_tokens for sample in good),
        output_tokens=tokens,
        output_lengths=lengths,
        is_equal_length=lengths == [max_tokens],
        is_counted_by_server=all(sample.has_usage for sample in good),
        tokens_per_s=round(tokens / run.seconds, 2),
        requests_per_s=round(len(good) / run.seconds, 3),
        goodput_per_s=_goodput(good, slo, run.seconds) if slo and slo.is_set else None,
        ttft_p50_ms=percentile_ms(ttft, 50),
        ttft_p99_ms=percentile_ms(ttft, 99),
        inter_token_p50_ms=percentile_ms(gaps, 50),
        inter_token_p99_ms=percentile_ms(gaps, 99),
        end_to_end_p50_ms=percentile_ms(ends, 50),
        end_to_end_p99_ms=percentile_ms(ends, 99),
        send_lag_p99_ms=percentile_ms(lags, 99),
        client_cpu=round(run.client_cpu_seconds / run.seconds, 3),
    )


def _goodput(good: Sequence[Sample], slo: Slo, seconds: float) -> float:
    return round(sum(is_within(sample, slo) for sample in good) / seconds, 3)


def is_within(sample: Sample, slo: Slo) -> bool:
    """True if a successful request met the SLO; an unmeasured time counts as missed."""
    pairs = ((slo.ttft_ms, ttft_s(sample)), (slo.itl_ms, mean_inter_token_s(sample)))
    return all(
        limit is None or (value is not None and 1000 * value <= limit) for limit, value in pairs
    )


def percentile_ms(values: Sequence[float], rank: int) -> float | None:
    """The rank-th percentile of seconds, in milliseconds; None without values."""
    return round(1000 * float(np.percentile(values, rank)), 3) if values else None


def median_summary(runs: Sequence[Summary]) -> dict[str, object]:
    """The median of each figure over several runs of one level; counts are summed."""
    merged: dict[str, object] = asdict(
        replace(
            runs[0],
            output_lengths=sorted({length for run in runs for length in run.output_lengths}),
            errors_by_kind=dict(sum((Counter(run.errors_by_kind) for run in runs), Counter())),
            is_equal_length=all(run.is_equal_length for run in runs),
            is_counted_by_server=all(run.is_counted_by_server for run in runs),
        )
    )
    for name in ("requests", "errors", "prompt_tokens", "output_tokens"):
        merged[name] = sum(getattr(run, name) for run in runs)
    for name, first in asdict(runs[0]).items():
        if name == "seconds" or name.endswith(("_per_s", "_ms", "_cpu")):
            values = [getattr(run, name) for run in runs]
            known = [value for value in values if value is not None]
            merged[name] = round(statistics.median(known), 3) if known else first
    merged["runs"] = len(runs)
    return merged
