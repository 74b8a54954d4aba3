"""Requests and tokens a minute of each key, by a clock that the test moves."""

import multiprocessing
import os

import pytest

from vlmserve.server.admission.key_file import ApiKey, digest_of
from vlmserve.server.admission.rate_limits import RateLimits, duration
from vlmserve.server.errors import RateLimitError

REQUESTS = ApiKey(digest_of("r"), "team-r", requests_per_minute=60)
TOKENS = ApiKey(digest_of("t"), tokens_per_minute=600)
BOTH = ApiKey(digest_of("b"), requests_per_minute=6, tokens_per_minute=600)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["memory", "folder"])
def limits(request, tmp_path):
    clock = Clock()
    folder = tmp_path / "rates" if request.param == "folder" else None
    limits = RateLimits(folder, clock)
    limits.clock = clock
    return limits


def num_taken(limits: RateLimits, key: ApiKey, most: int = 1000) -> int:
    for count in range(most):
        try:
            limits.take_request(key)
        except RateLimitError:
            return count
    return most


def test_a_key_has_a_minutes_requests_and_then_one_a_second(limits):
    assert num_taken(limits, REQUESTS) == 60
    with pytest.raises(RateLimitError, match="team-r may send 60 requests a minute") as refused:
        limits.take_request(REQUESTS)
    assert refused.value.retry_after_s == pytest.approx(1.0)
    assert (refused.value.status, refused.value.code) == (429, "rate_limit_exceeded")
    limits.clock.now += 5.0
    assert num_taken(limits, REQUESTS) == 5
    limits.clock.now += 10_000.0
    assert num_taken(limits, REQUESTS) == 60, "unused minutes are not kept"


def test_tokens_may_overdraw_and_then_the_key_waits(limits):
    limits.take_request(TOKENS)
    limits.take_tokens(TOKENS, 900)
    with pytest.raises(RateLimitError, match="this API key may use 600 tokens") as refused:
        limits.take_request(TOKENS)
    assert refused.value.retry_after_s == pytest.approx(30.1)
    limits.clock.now += refused.value.retry_after_s
    limits.take_request(TOKENS)


def test_a_refused_request_costs_nothing(limits):
    limits.take_tokens(BOTH, 700)
    assert num_taken(limits, BOTH) == 0
    assert limits.headers(BOTH)["x-ratelimit-remaining-requests"] == "6"


def test_headers_are_openais(limits):
    assert limits.headers(ApiKey(digest_of("free"))) == {}
    limits.take_request(BOTH)
    limits.take_tokens(BOTH, 150)
    assert limits.headers(BOTH) == {
        "x-ratelimit-limit-requests": "6",
        "x-ratelimit-remaining-requests": "5",
        "x-ratelimit-reset-requests": "10s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "450",
        "x-ratelimit-reset-tokens": "15s",
    }
    assert set(limits.headers(REQUESTS)) == {
        f"x-ratelimit-{part}-requests" for part in ("limit", "remaining", "reset")
    }


def test_a_limit_that_the_file_lowers_holds_at_once(limits):
    limits.take_request(REQUESTS)
    lower = ApiKey(REQUESTS.digest, requests_per_minute=3)
    assert num_taken(limits, lower) == 3


def _take_many(folder, taken) -> None:
    limits = RateLimits(folder, lambda: 1000.0)
    taken.put(num_taken(limits, ApiKey(digest_of("m"), requests_per_minute=300)))


def test_row_71_workers_share_a_keys_rate_exactly(tmp_path):
    context = multiprocessing.get_context("spawn")
    taken = context.SimpleQueue()
    workers = [context.Process(target=_take_many, args=(tmp_path / "r", taken)) for _ in range(3)]
    for worker in workers:
        worker.start()
    counts = [taken.get() for _ in workers]
    for worker in workers:
        worker.join()
    assert sum(counts) == 300


def test_files_name_no_key_and_are_this_users_alone(tmp_path):
    limits = RateLimits(tmp_path / "rates", Clock())
    for _ in range(10):
        limits.take_tokens(TOKENS, 1)
    (file,) = (tmp_path / "rates").iterdir()
    assert file.name == TOKENS.digest.hex()
    assert file.stat().st_size == 24
    assert os.stat(file).st_mode & 0o077 == os.stat(file.parent).st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.0121, "13ms"), (1, "1s"), (6.5, "6.5s"), (60, "1m0s"), (3723.5, "1h2m3.5s")],
)
def test_durations_are_written_as_openai_writes_them(seconds, text):
    assert duration(seconds) == text
