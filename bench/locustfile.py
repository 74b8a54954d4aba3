"""Locust users who each ask about pictures that nobody has sent before, and read the stream.

    pip install 'vlmserve[bench]'
    locust -f bench/locustfile.py --host http://127.0.0.1:8000
    locust -f bench/locustfile.py --host http://127.0.0.1:8000 --headless -u 16 -r 4 -t 60s

Beside the whole answer, each request reports its time to first text and the times between its
pieces of text as rows of their own. A stream that breaks off or holds an error is a failure. The
API key is taken from VLMSERVE_API_KEY. Users wait for their answers: for arrivals that do not, see
`vlmserve bench serve --request-rate`.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from argparse import ArgumentParser
from typing import Any

from locust import HttpUser, constant_pacing, events, task
from requests.exceptions import RequestException

from vlmserve.server.bench.load import QUESTION, unique_pictures

ANSWER, TTFT, INTER_TOKEN = "chat completion", "time to first text", "between two pieces of text"
_user_numbers = itertools.count()


@events.init_command_line_parser.add_listener
def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--model", default="vlmserve-tiny-vision", help="Name in the API")
    parser.add_argument("--image-size", type=int, default=224, help="Side of a picture in pixels")
    parser.add_argument("--output-tokens", type=int, default=64, help="Tokens an answer")
    parser.add_argument("--seed", type=int, default=0, help="Of the pictures")


class PictureUser(HttpUser):
    """Asks again as soon as it has its answer, but not more often than once in 10 ms."""

    wait_time = constant_pacing(0.01)

    def on_start(self) -> None:
        options = self.environment.parsed_options
        self.options = options
        size = (options.image_size, options.image_size)
        # Each user, in each worker process, draws pictures of its own.
        seed = [options.seed, next(_user_numbers), os.getpid()]
        self.pictures = unique_pictures([size], seed)
        if key := os.environ.get("VLMSERVE_API_KEY", "").split()[:1]:
            self.client.headers["Authorization"] = f"Bearer {key[0]}"

    @task
    def ask(self) -> None:
        body = self.body(next(self.pictures))  # drawn before the request's clock starts
        start = time.perf_counter()
        with self.client.post(
            "/v1/chat/completions", json=body, stream=True, catch_response=True, name=ANSWER
        ) as response:
            if response.status_code != 200:
                response.failure(f"HTTP {response.status_code}")
                return
            times: list[float] = []
            try:
                failure = read_stream(response.iter_lines(chunk_size=None), times)
            except RequestException as error:
                failure = f"cut stream: {type(error).__name__}"
            # Locust's own figure ends with the head of the answer.
            response.request_meta["response_time"] = 1000 * (time.perf_counter() - start)
            if failure:
                response.failure(failure)
                return
            response.success()
        self.report(start, times)

    def body(self, picture: str) -> dict[str, Any]:
        content = [
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "text", "text": QUESTION},
        ]
        return {
            "model": self.options.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.options.output_tokens,
            "temperature": 0,
            "stream": True,
        }

    def report(self, start: float, times: list[float]) -> None:
        """Rows of their own for the first piece of text and the gaps between all."""
        if times:
            self.fire(TTFT, times[0] - start)
        for earlier, later in itertools.pairwise(times):
            self.fire(INTER_TOKEN, later - earlier)

    def fire(self, name: str, seconds: float) -> None:
        self.environment.events.request.fire(
            request_type="STREAM",
            name=name,
            response_time=1000 * seconds,
            response_length=0,
            exception=None,
            context={},
        )


def read_stream(lines: Any, times: list[float]) -> str | None:
    """Append to times when each piece of text came.

    Returns why the stream is no good, or None where it is whole.
    """
    is_whole = False
    for line in lines:
        if not line.startswith(b"data:"):
            continue
        now, data = time.perf_counter(), line[len(b"data:") :].strip()
        if data == b"[DONE]":
            is_whole = True
            continue
        chunk = json.loads(data)
        if chunk.get("error"):
            return "error event"
        for choice in chunk.get("choices") or ():
            if (choice.get("delta") or {}).get("content"):
                times.append(now)
    return None if is_whole else "cut stream"
