"""Locust users that ask about new pictures and read the streamed answers.

    pip install 'vlmserve[bench]'
    locust -f bench/locustfile.py --host http://127.0.0.1:8000
    locust -f bench/locustfile.py --host http://127.0.0.1:8000 --headless -u 16 -r 4 -t 60s

Separate rows report the time to first text and the times between pieces of text. A stream that
breaks off or contains an error is a failure. VLMSERVE_API_KEY is the API key. Users wait for their
answers: for arrivals that do not wait, see `vlmserve bench serve --request-rate`.
"""

from __future__ import annotations

import itertools
import os
import time
from argparse import ArgumentParser
from collections.abc import Iterable

from locust import HttpUser, constant_pacing, events, task
from requests.exceptions import RequestException

from vlmserve.server.bench.client import DATA, DONE, Sample, take
from vlmserve.server.bench.load import QUESTION, request_body, unique_pictures
from vlmserve.server.bench.settings import Load

ANSWER, TTFT, INTER_TOKEN = "chat completion", "time to first text", "between two pieces of text"
_user_numbers = itertools.count()


@events.init_command_line_parser.add_listener
def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--model", default="vlmserve-tiny-vision", help="Name in the API")
    parser.add_argument("--image-size", type=int, default=224, help="Side of a picture in pixels")
    parser.add_argument("--output-tokens", type=int, default=64, help="Tokens an answer")
    parser.add_argument("--seed", type=int, default=0, help="Of the pictures")


class PictureUser(HttpUser):
    """Asks again as soon as the answer is complete, at most once in 10 ms."""

    wait_time = constant_pacing(0.01)

    def on_start(self) -> None:
        options = self.environment.parsed_options
        self.options = options
        size = (options.image_size, options.image_size)
        # Each user of each worker process draws different pictures.
        seed = [options.seed, next(_user_numbers), os.getpid()]
        self.pictures = unique_pictures([size], seed)
        self.client.headers["Content-Type"] = "application/json"
        if key := os.environ.get("VLMSERVE_API_KEY", "").split()[:1]:
            self.client.headers["Authorization"] = f"Bearer {key[0]}"

    @task
    def ask(self) -> None:
        load = Load(1, self.options.output_tokens)
        # drawn before the request's clock starts
        body = request_body(load, self.options.model, self.pictures, QUESTION)
        sample = Sample(start := time.perf_counter(), start)
        with self.client.post(
            "/v1/chat/completions", data=body, stream=True, catch_response=True, name=ANSWER
        ) as response:
            if response.status_code != 200:
                response.failure(f"HTTP {response.status_code}")
                return
            try:
                read_stream(response.iter_lines(chunk_size=None), sample)
            except RequestException as error:
                sample.fail("cut stream", type(error).__name__)
            # Locust's own figure ends with the head of the answer.
            response.request_meta["response_time"] = 1000 * (time.perf_counter() - start)
            if sample.error:
                response.failure(f"{sample.error}: {sample.detail}")
                return
            response.success()
        self.report(start, sample.chunk_times)

    def report(self, start: float, times: list[float]) -> None:
        """Report the first piece of text and the gaps between pieces as separate rows."""
        pairs = [(TTFT, start, times[0])] if times else []
        pairs += [(INTER_TOKEN, *pair) for pair in itertools.pairwise(times)]
        for name, earlier, later in pairs:
            self.environment.events.request.fire(
                request_type="STREAM",
                name=name,
                response_time=1000 * (later - earlier),
                response_length=0,
                exception=None,
                context={},
            )


def read_stream(lines: Iterable[bytes], sample: Sample) -> None:
    """Add the stream's events to the sample; a stream without an end is a failure."""
    is_whole = False
    for line in lines:
        if line.startswith(DATA):
            data = line[len(DATA) :].strip()
            is_whole = data == DONE or take(sample, data, time.perf_counter()) or is_whole
    if not is_whole:
        sample.fail("cut stream", "it ended without a finish_reason")
