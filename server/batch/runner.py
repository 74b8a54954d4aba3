"""Sends the requests of a batch, a few at a time, and writes each result as it ends.

Owns concurrency and retries. A refusal that passes (429, 503, 504, a lost connection) is tried
again after the time that the server names. Knows nothing of files' forms or of the terminal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
import orjson

from .requests import BatchError, BatchRequest, BatchRequests
from .results import Results

PASSING = (429, 502, 503, 504)
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """url: the server's address, with or without `/v1`. max_retries: of one request. timeout_s: of
    one try.
    """

    url: str
    api_key: str | None = None
    model: str | None = None
    concurrency: int = 16
    max_retries: int = 20
    timeout_s: float = 600.0


@dataclass(slots=True)
class BatchCounts:
    """What a run did. num_skipped: results of an earlier run."""

    num_done: int = 0
    num_failed: int = 0
    num_skipped: int = 0


Progress = Callable[[BatchCounts], None]


async def run_batch(
    requests: BatchRequests,
    results: Results,
    options: BatchOptions,
    on_progress: Progress = lambda counts: None,
) -> BatchCounts:
    """Send what has no result yet. Raises BatchError if the server cannot be asked at all."""
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    limits = httpx2.Limits(max_connections=options.concurrency)
    async with httpx2.AsyncClient(
        base_url=_base_of(options.url),
        headers=headers,
        timeout=options.timeout_s,
        limits=limits,
        trust_env=False,
    ) as client:
        model = options.model or await _first_model(client)
        run = _Run(client, model, results, options, on_progress, BatchCounts())
        waiting = run.unfinished(requests.read())
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(options.concurrency):
                    group.create_task(run.work(waiting))
        except ExceptionGroup as group_error:
            # The first that failed cancelled the others.
            raise group_error.exceptions[0] from None
    return run.counts


def _base_of(url: str) -> httpx2.URL:
    """The server's address, which OpenAI's clients write with `/v1`. Raises BatchError."""
    try:
        base = httpx2.URL(url.rstrip("/").removesuffix("/v1"))
    except httpx2.InvalidURL as error:
        raise BatchError(f"--url {url} is no address: {error}") from error
    if base.scheme not in ("http", "https") or not base.host:
        raise BatchError(f"--url {url} is no address: write it as http://127.0.0.1:8000")
    return base


async def _first_model(client: httpx2.AsyncClient) -> str:
    """The model of lines that name none."""
    try:
        response = await client.get("/v1/models")
        if response.status_code == httpx2.codes.OK:
            return str(response.json()["data"][0]["id"])
        reason = f"/v1/models answers {response.status_code}"
        if response.status_code == httpx2.codes.UNAUTHORIZED:
            reason += ": set VLMSERVE_API_KEY to a key of it"
    except (httpx2.HTTPError, ValueError, KeyError, IndexError) as error:
        reason = str(error) or type(error).__name__
    raise BatchError(f"the server at {client.base_url} cannot be asked: {reason}")


@dataclass(slots=True)
class _Run:
    client: httpx2.AsyncClient
    model: str
    results: Results
    options: BatchOptions
    on_progress: Progress
    counts: BatchCounts

    def unfinished(self, requests: Iterator[BatchRequest]) -> Iterator[BatchRequest]:
        """The requests without a result of an earlier run."""
        for request in requests:
            if request.custom_id in self.results.done:
                self.counts.num_skipped += 1
                self.on_progress(self.counts)
            else:
                yield request

    async def work(self, waiting: Iterator[BatchRequest]) -> None:
        """Send one request after the other until none waits."""
        # All workers share the iterator; it is advanced between two awaits only.
        for request in waiting:
            response, error = await self._result_of(request)
            self.results.write(request.custom_id, response, error)
            is_failed = response is None or response["status_code"] != 200
            self.counts.num_failed += is_failed
            self.counts.num_done += not is_failed
            self.on_progress(self.counts)

    async def _result_of(
        self, request: BatchRequest
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """The response and the error of a result; one of them is None."""
        if request.error is not None:
            return None, {"code": "invalid_line", "message": request.error}
        body = {"model": self.model} | request.body
        for attempt in range(self.options.max_retries + 1):
            is_last = attempt == self.options.max_retries
            try:
                response = await self.client.post(request.url, json=body)
            except httpx2.HTTPError as error:
                if is_last:
                    message = str(error) or type(error).__name__
                    return None, {"code": "connection_failed", "message": message}
                await asyncio.sleep(_pause_s(attempt))
                continue
            if response.status_code not in PASSING or is_last:
                return _shown(response), None
            await asyncio.sleep(_pause_s(attempt, response.headers.get("retry-after")))
        raise AssertionError("the last try returns")


def _pause_s(attempt: int, retry_after: str | None = None) -> float:
    """Seconds until the next try: what the server names, or twice the last."""
    if retry_after is not None and retry_after.isdigit():
        return min(float(retry_after), LONGEST_PAUSE_S)
    return float(min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S))


def _shown(response: httpx2.Response) -> dict[str, Any]:
    """OpenAI's form of a response in a result."""
    try:
        body = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        body = {"error": {"message": response.text[:1_000]}}
    return {
        "status_code": response.status_code,
        "request_id": response.headers.get("x-request-id", ""),
        "body": body,
    }
