"""Sends one request and records when the pieces of its answer arrive.

Owns HTTP and one request's clock. Knows nothing of when requests are due or how figures are
summarized. Uses httpcore2, the HTTP client with the least overhead; it ignores proxy variables.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

import httpcore2
import msgspec

from .settings import BenchError

DATA = b"data:"
DONE = b"[DONE]"


@dataclass(slots=True)
class Sample:
    """One request as its client saw it; times in seconds of one clock.

    due: when it should have been sent; latencies count from it. sent: when it was sent.
    chunk_times: when each piece of text arrived. prompt_tokens, completion_tokens: the server's
    counts; without usage (has_usage), completion_tokens counts pieces. error: the kind of failure.
    """

    due: float
    sent: float
    chunk_times: list[float] = field(default_factory=list)
    end: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    has_usage: bool = False
    error: str | None = None
    detail: str = ""

    def fail(self, kind: str, detail: str) -> None:
        """Record a failure; the first failure wins."""
        if self.error is None:
            self.error, self.detail = kind, detail


class _Text(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Text = msgspec.field(default_factory=_Text)
    message: _Text = msgspec.field(default_factory=_Text)
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Answer(msgspec.Struct):
    """The fields that figures need, of a plain answer or of a streamed chunk."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


_decode_answer = msgspec.json.Decoder(_Answer).decode


class Client:
    """Sends requests to one base URL (…/v1), each open request on its own connection."""

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        self._url = _checked_url(url)
        self._timeout_s = timeout_s
        # httpcore2 would name an IPv6 host without its brackets
        host = urlsplit(self._url).netloc
        self._headers = [("Host", host), ("Accept", "*/*"), ("User-Agent", "vlmserve-bench")]
        if api_key:
            self._headers.append(("Authorization", f"Bearer {api_key}"))
        self._pool = httpcore2.AsyncConnectionPool(max_connections=None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._pool.aclose()

    async def model_names(self) -> list[str]:
        """Return the names that /models lists. Raises BenchError if the server does not answer."""
        url = f"{self._url}/models"
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._pool.request("GET", url, headers=self._headers)
        except (OSError, httpcore2.NetworkError, httpcore2.ProtocolError, TimeoutError) as error:
            raise BenchError(f"no answer from {url} ({_text_of(error)}): is it running?") from error
        if response.status != 200:
            raise BenchError(f"{url} answers {response.status}: {_excerpt(response.content)}")
        try:
            return [model.id for model in msgspec.json.decode(response.content, type=_Models).data]
        except msgspec.DecodeError as error:
            raise BenchError(f"{url} does not list models as OpenAI's API does") from error

    async def chat(
        self, body: bytes, due: float | None = None, headers: Sequence[tuple[str, str]] = ()
    ) -> Sample:
        """Send a chat completion and read its whole answer. Never raises for a failed request.

        due: when it should have been sent, by time.perf_counter; default: now. headers: of this
        request alone.
        """
        sent = time.perf_counter()
        sample = Sample(sent if due is None else due, sent)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._exchange(body, headers, sample)
        except TimeoutError:
            sample.fail("timeout", f"no complete answer within {self._timeout_s:g} s")
        except (OSError, httpcore2.NetworkError, httpcore2.ProtocolError) as error:
            sample.fail("connection", _text_of(error))
        except msgspec.DecodeError as error:
            sample.fail("not JSON", _text_of(error))
        sample.end = time.perf_counter()
        return sample

    async def _exchange(
        self, body: bytes, headers: Sequence[tuple[str, str]], sample: Sample
    ) -> None:
        url = f"{self._url}/chat/completions"
        sent = [*self._headers, ("Content-Type", "application/json"), *headers]
        async with self._pool.stream("POST", url, headers=sent, content=body) as response:
            if response.status != 200:
                text = _excerpt(await response.aread())
                sample.fail(f"HTTP {response.status}", text)
            elif _is_event_stream(response):
                await _read_stream(response, sample)
            else:
                take(sample, await response.aread(), None)
        if sample.error is None and sample.completion_tokens == 0:
            sample.fail("empty answer", "the server sent no text")


async def _read_stream(response: httpcore2.Response, sample: Sample) -> None:
    """Take the events as they arrive; a stream without a proper end is a failure."""
    buffer, is_whole = bytearray(), False
    async for part in response.aiter_stream():
        now = time.perf_counter()
        buffer += part
        for data in _events(buffer):
            is_whole = data == DONE or take(sample, data, now) or is_whole
    if not is_whole:
        sample.fail("cut stream", "it ended without a finish_reason")


def _events(buffer: bytearray) -> Iterator[bytes]:
    """Yield the data of each complete line and remove the line from the buffer."""
    while (end := buffer.find(b"\n")) >= 0:
        line = bytes(buffer[:end]).strip()
        del buffer[: end + 1]
        if line.startswith(DATA):
            yield line[len(DATA) :].strip()


def take(sample: Sample, data: bytes, now: float | None) -> bool:
    """Add an answer's text, usage and error to its sample. now: when a streamed piece arrived.

    Returns whether the answer is complete.
    """
    answer = _decode_answer(data)
    if answer.error:
        sample.fail("error event", str(answer.error)[:200])
    for choice in answer.choices:
        if choice.delta.content or choice.message.content:
            sample.completion_tokens += 0 if sample.has_usage else 1
            if now is not None:
                sample.chunk_times.append(now)
    if answer.usage is not None:
        sample.has_usage = True
        sample.prompt_tokens = answer.usage.prompt_tokens
        sample.completion_tokens = answer.usage.completion_tokens
    return any(choice.finish_reason for choice in answer.choices)


def _is_event_stream(response: httpcore2.Response) -> bool:
    types = [value for name, value in response.headers if name.lower() == b"content-type"]
    return any(value.startswith(b"text/event-stream") for value in types)


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError as error:  # an IPv6 address without its closing bracket
        raise BenchError(f"{url!r} is not a base URL: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BenchError(f"{url!r} is not a base URL: use, for example, http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise BenchError(
            "the base URL must have no user, password or query: pass a key with --api-key-env"
        )
    return url.rstrip("/")


def _excerpt(content: bytes) -> str:
    return " ".join(content.decode(errors="replace").split())[:200]


def _text_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")
