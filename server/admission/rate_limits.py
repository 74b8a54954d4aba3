"""Requests and tokens a minute of each API key, exact over all workers of a server.

Owns one bucket pair for each key that has a limit: each bucket fills steadily to one minute's
amount. A request starts if a whole request is left and any token is. Its prompt's tokens count
when it is prepared, generated tokens as they come; so the tokens left may fall below zero, and the
key's next requests wait until they are above it again.

The state of a key is one small file in a folder that all workers of the server share, changed
under a lock; the kernel releases the lock of a worker that dies. The clock is the system's
monotonic one, which all processes share. Without a folder the state is in memory.
"""

from __future__ import annotations

import fcntl
import math
import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import RateLimitError
from .key_file import ApiKey

MINUTE_S = 60.0
# Sums of floating-point numbers are off by less.
ROUNDING_S = 1e-6
FOLDER_NAME = "rate-limits"
_STATE = struct.Struct("<ddd")


@dataclass(slots=True)
class Buckets:
    """What a key has left at `at`, in seconds of the clock."""

    at: float
    requests: float
    tokens: float

    def fill(self, key: ApiKey, now: float) -> None:
        """Add what has come since `at`; at most one minute's amount is kept."""
        minutes = max(0.0, now - self.at) / MINUTE_S
        self.at = now
        self.requests = _filled(self.requests, key.requests_per_minute, minutes)
        self.tokens = _filled(self.tokens, key.tokens_per_minute, minutes)


def _filled(left: float, limit: int | None, minutes: float) -> float:
    return math.inf if limit is None else min(float(limit), left + limit * minutes)


class RateLimits:
    """The buckets of all keys. folder: where workers share them; None: this worker is alone.

    clock: seconds, monotonic, the same in all processes.
    """

    def __init__(
        self, folder: Path | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder = folder
        self._clock = clock
        self._in_memory: dict[bytes, Buckets] = {}

    def take_request(self, key: ApiKey) -> None:
        """Count one request that wants to start. Raises RateLimitError if none may."""
        if not key.has_rates:
            return
        wait_s = 0.0

        def take(left: Buckets) -> None:
            nonlocal wait_s
            wait_s = max(
                _wait_s(left.requests, 1.0, key.requests_per_minute),
                _wait_s(left.tokens, 1.0, key.tokens_per_minute),
            )
            if wait_s <= 0:
                left.requests -= 1

        left = self._change(key, take)
        if wait_s > 0:
            raise RateLimitError(_message(key, left), retry_after_s=wait_s)

    def take_tokens(self, key: ApiKey, num_tokens: int) -> None:
        """Count tokens that a request of this key has used."""
        if key.tokens_per_minute is None:
            return

        def take(left: Buckets) -> None:
            left.tokens -= num_tokens

        self._change(key, take)

    def headers(self, key: ApiKey) -> dict[str, str]:
        """OpenAI's headers: the limits, what is left, and when all of it will be back."""
        if not key.has_rates:
            return {}
        left = self._change(key, lambda left: None)
        found: dict[str, str] = {}
        for what, limit, amount in (
            ("requests", key.requests_per_minute, left.requests),
            ("tokens", key.tokens_per_minute, left.tokens),
        ):
            if limit is not None:
                found[f"x-ratelimit-limit-{what}"] = str(limit)
                found[f"x-ratelimit-remaining-{what}"] = str(max(0, math.floor(amount)))
                found[f"x-ratelimit-reset-{what}"] = duration(_wait_s(amount, limit, limit))
        return found

    def _change(self, key: ApiKey, change: Callable[[Buckets], None]) -> Buckets:
        if self._folder is None:
            left = self._in_memory.get(key.digest) or _full(key, self._clock())
            self._in_memory[key.digest] = left
            left.fill(key, self._clock())
            change(left)
            return left
        return self._change_file(self._folder / key.digest.hex(), key, change)

    def _change_file(self, file: Path, key: ApiKey, change: Callable[[Buckets], None]) -> Buckets:
        descriptor = _open(file)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            state = os.pread(descriptor, _STATE.size, 0)
            now = self._clock()
            # A file that a worker created and did not fill yet is a key that has used nothing.
            is_whole = len(state) == _STATE.size
            left = Buckets(*_STATE.unpack(state)) if is_whole else _full(key, now)
            left.fill(key, now)
            change(left)
            os.pwrite(descriptor, _STATE.pack(left.at, left.requests, left.tokens), 0)
            return left
        finally:
            os.close(descriptor)


def _open(file: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(file, flags, 0o600)
    except FileNotFoundError:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(file, flags, 0o600)


def _full(key: ApiKey, now: float) -> Buckets:
    return Buckets(now, float(key.requests_per_minute or 0), float(key.tokens_per_minute or 0))


def _wait_s(left: float, wanted: float, limit: int | None) -> float:
    """Seconds until `wanted` is left; 0 if it is, or if there is no limit."""
    if limit is None:
        return 0.0
    wait_s = (wanted - left) * MINUTE_S / limit
    return wait_s if wait_s > ROUNDING_S else 0.0


def _message(key: ApiKey, left: Buckets) -> str:
    name = "this API key" if key.name is None else f"the API key {key.name}"
    if key.requests_per_minute is not None and left.requests < 1:
        return f"{name} may send {key.requests_per_minute:,} requests a minute: slow down"
    return f"{name} may use {key.tokens_per_minute:,} tokens a minute: slow down"


def duration(seconds: float) -> str:
    """As in OpenAI's headers: 120ms, 6.5s, 6m0s, 1h2m3s; rounded up to milliseconds."""
    milliseconds = math.ceil(seconds * 1000 - 1e-6)
    if milliseconds < 1000:
        return f"{max(0, milliseconds)}ms" if milliseconds > 0 else "0s"
    minutes, rest = divmod(milliseconds, 60_000)
    text = f"{rest / 1000:g}s"
    if minutes == 0:
        return text
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{text}" if hours else f"{minutes}m{text}"
