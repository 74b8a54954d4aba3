"""What a load sends and when, and what its figures mean."""

import asyncio
import importlib
import itertools
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy
import pytest

from vlmserve.server.bench.client import Sample
from vlmserve.server.bench.load import request_bodies, unique_pictures
from vlmserve.server.bench.plot import check_can_plot
from vlmserve.server.bench.report import warnings
from vlmserve.server.bench.runner import Run, poisson_arrivals, run_level
from vlmserve.server.bench.settings import BenchError, Level, Load, Slo
from vlmserve.server.bench.summary import median_summary, summarize
from vlmserve.server.bench.sweep import default_requests

BENCH = Path(__file__).resolve().parents[2] / "bench"
DEADLINE_S = 120.0


def sample(ttft=0.5, gaps=(0.1,), due=0.0, sent=0.0, **more):
    times = list(itertools.accumulate(gaps, initial=due + ttft))
    known = {"end": times[-1], "completion_tokens": len(times), "has_usage": True} | more
    return Sample(due, sent, times, **known)


def summary_of(*samples, max_tokens=2, slo=None, seconds=1.0, cpu=0.1):
    return summarize(Level(concurrency=2), Run(list(samples), seconds, cpu), max_tokens, slo)


class Recorder:
    """A server that answers nobody before `all_at_once` requests are open."""

    def __init__(self, all_at_once):
        self.sent, self.open, self.most_open = [], 0, 0
        self.are_all_here = asyncio.Event()
        self.all_at_once = all_at_once

    async def chat(self, body, due=None):
        now = time.perf_counter()
        self.sent.append(body)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        if self.open == self.all_at_once:
            self.are_all_here.set()
        await self.are_all_here.wait()
        await asyncio.sleep(0)
        self.open -= 1
        return Sample(now if due is None else due, now, end=time.perf_counter())


def test_every_picture_of_a_run_is_unique():
    pictures = list(itertools.islice(unique_pictures([(64, 64)], seed=3), 200))
    assert len(set(pictures)) == 200
    others = list(itertools.islice(unique_pictures([(64, 64)], seed=4), 200))
    assert not set(pictures) & set(others)


def pictures_of(body):
    (message,) = json.loads(body)["messages"]
    return [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]


def test_a_pool_of_pictures_is_shown_again_and_again():
    load = Load(10, num_images=2, image_sizes=((32, 32), (48, 32)), image_pool=3)
    shown = [url for body in request_bodies(load, "m") for url in pictures_of(body)]
    assert len(shown) == 20
    assert len(set(shown)) == 3
    assert shown[:3] == shown[3:6]


def test_a_load_is_the_same_for_the_same_seed_and_another_for_another():
    load = Load(4, image_sizes=((32, 32),), prompt_words=5, seed=1)
    assert request_bodies(load, "m") == request_bodies(load, "m")
    assert not set(request_bodies(load, "m")) & set(request_bodies(replace(load, seed=2), "m"))


def test_prompts_have_the_words_that_were_asked_for_and_differ():
    bodies = request_bodies(Load(20, num_images=0, prompt_words=12), "m")
    texts = [json.loads(body)["messages"][0]["content"][0]["text"] for body in bodies]
    assert {len(text.split()) for text in texts} == {12 + 5}
    assert len(set(texts)) == 20


def test_arrivals_are_a_poisson_process_of_the_rate_that_was_asked_for():
    times = poisson_arrivals(5.0, 2001, seed=1)
    gaps = numpy.diff(times)
    assert times[0] == 0
    assert times[-1] == pytest.approx(2000 / 5.0)
    # Exponential: as wide as its mean, and e^-1 of the gaps above it.
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.1)
    assert (gaps > gaps.mean()).mean() == pytest.approx(math.exp(-1), abs=0.04)
    assert (poisson_arrivals(5.0, 2001, seed=1) == times).all()
    assert (poisson_arrivals(5.0, 2001, seed=2) != times).any()
    assert poisson_arrivals(5.0, 1, seed=1).tolist() == [0.0]


def test_at_a_rate_requests_are_sent_although_none_is_answered():
    """Closed-loop clients wait for a slow server and so never see its queue."""

    async def run():
        chat = Recorder(all_at_once=12)
        bodies = [bytes([n]) for n in range(12)]
        async with asyncio.timeout(DEADLINE_S):
            done = await run_level(chat, bodies, Level(request_rate=1000.0))
        return chat, done

    chat, done = asyncio.run(run())
    assert chat.most_open == 12
    assert len(done.samples) == 12
    assert all(sample.sent >= sample.due for sample in done.samples)


def test_at_a_concurrency_no_more_requests_are_open_and_all_are_sent_once():
    async def run():
        chat = Recorder(all_at_once=3)
        async with asyncio.timeout(DEADLINE_S):
            done = await run_level(chat, [bytes([n]) for n in range(10)], Level(concurrency=3))
        return chat, done

    chat, done = asyncio.run(run())
    assert chat.most_open == 3
    assert sorted(chat.sent) == [bytes([n]) for n in range(10)]
    assert all(sample.sent == sample.due for sample in done.samples)


def test_latencies_count_from_when_a_request_was_due_and_not_from_its_sending():
    late = sample(ttft=1.5, due=10.0, sent=11.0)
    summary = summary_of(late)
    assert summary.ttft_p50_ms == 1500.0
    assert summary.end_to_end_p50_ms == 1600.0
    assert summary.send_lag_p99_ms == 1000.0


def test_a_failed_request_is_counted_as_an_error_and_not_as_a_fast_one():
    bad = Sample(0.0, 0.0, end=0.001, error="HTTP 503")
    summary = summary_of(sample(), bad, bad)
    assert (summary.requests, summary.errors, summary.output_tokens) == (1, 2, 2)
    assert summary.errors_by_kind == {"HTTP 503": 2}
    assert summary.ttft_p50_ms == summary.ttft_p99_ms == 500.0
    assert summary.inter_token_p50_ms == 100.0
    assert summary.requests_per_s == 1.0
    assert any("2 of 3 failed: HTTP 503" in line for line in warnings(summary, 2))


def test_nothing_measured_is_null_and_not_zero():
    summary = summary_of(Sample(0.0, 0.0, end=1.0, error="timeout"))
    assert (summary.ttft_p50_ms, summary.inter_token_p99_ms, summary.end_to_end_p50_ms) == (
        None,
    ) * 3
    assert summary.goodput_per_s is None


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        (Slo(ttft_ms=600), 3),
        (Slo(ttft_ms=400), 1),
        (Slo(itl_ms=150), 3),
        (Slo(ttft_ms=600, itl_ms=150), 2),
        (Slo(ttft_ms=1, itl_ms=1), 0),
    ],
)
def test_goodput_counts_requests_that_keep_every_limit(slo, good):
    quick, usual, late = sample(0.3), sample(0.5), sample(0.9)
    uneven = sample(0.5, gaps=(0.2, 0.2))
    failed = Sample(0.0, 0.0, end=0.1, error="connection")
    summary = summary_of(quick, usual, late, uneven, failed, slo=slo, seconds=2.0)
    assert summary.goodput_per_s == good / 2.0


def test_a_request_in_few_large_pieces_is_judged_by_its_time_a_token():
    """Two pieces of 50 tokens each, 1 s apart: 10 ms a token, not 1,000."""
    lumpy = sample(0.5, gaps=(1.0,), completion_tokens=101)
    assert summary_of(lumpy, slo=Slo(itl_ms=11)).goodput_per_s == 1.0
    assert summary_of(lumpy, slo=Slo(itl_ms=9)).goodput_per_s == 0.0


def test_answers_of_other_lengths_are_reported_and_warned_of():
    equal = summary_of(sample(), sample())
    assert equal.is_equal_length
    assert warnings(equal, 2) == []
    mixed = summary_of(sample(), sample(gaps=(0.1, 0.1)))
    assert mixed.output_lengths == [2, 3]
    assert not mixed.is_equal_length
    assert any("2 to 3 tokens instead of 2" in line for line in warnings(mixed, 2))


def test_a_busy_client_and_a_server_without_usage_are_warned_of():
    assert any("95% of a core" in line for line in warnings(summary_of(sample(), cpu=0.95), 2))
    uncounted = summary_of(sample(has_usage=False))
    assert not uncounted.is_counted_by_server
    assert any("no usage" in line for line in warnings(uncounted, 2))


def test_medians_are_taken_of_figures_and_sums_of_counts():
    runs = [summary_of(sample(ttft), seconds=s) for ttft, s in ((0.1, 1.0), (0.3, 2.0), (0.2, 4.0))]
    runs[1] = replace(runs[1], errors=2, errors_by_kind={"timeout": 2})
    merged = median_summary(runs)
    assert merged["ttft_p50_ms"] == 200.0
    assert merged["tokens_per_s"] == 1.0
    assert merged["goodput_per_s"] is None
    assert (merged["requests"], merged["errors"], merged["runs"]) == (3, 2, 3)
    assert merged["errors_by_kind"] == {"timeout": 2}
    assert merged["concurrency"] == 2


def test_a_level_has_a_number_of_requests_that_suits_it():
    assert default_requests(Level(concurrency=1)) == 8
    assert default_requests(Level(concurrency=16)) == 64
    assert default_requests(Level(request_rate=0.1)) == 8
    assert default_requests(Level(request_rate=2.5)) == 75


def test_a_plot_that_cannot_be_written_is_refused_before_the_load(tmp_path, monkeypatch):
    check_can_plot(tmp_path / "a.png")
    for path, said in (
        (tmp_path / "a.svg", "must end in .png"),
        (tmp_path / "b/a.png", "no folder"),
    ):
        with pytest.raises(BenchError, match=said):
            check_can_plot(path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BenchError, match=r"needs matplotlib: pip install 'vlmserve\[bench\]'"):
        check_can_plot(tmp_path / "a.png")


def test_peers_are_compared_only_where_all_answers_have_the_same_length(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    peers = importlib.import_module("peers")
    ours = [summary_of(sample(), seconds=s) for s in (1.0, 1.0, 1.0)]
    theirs = [summary_of(sample(), seconds=s) for s in (2.0, 4.0, 5.0)]
    assert peers.ratio(ours, theirs) == 4.0
    shorter = summary_of(sample(gaps=()))
    assert peers.ratio(ours, [*theirs[:2], shorter]) is None
    assert peers.ratio(ours, [*theirs[:2], replace(theirs[2], errors=1)]) is None
