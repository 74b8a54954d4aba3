"""What a benchmark is to do: its loads, its levels, its target.

Owns names and defaults only, so that the command line starts without numpy or an HTTP client.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Size = tuple[int, int]
IgnoreEos = Literal["auto", "on", "off"]


class BenchError(Exception):
    """The load cannot be offered; the message is one line that says what to do."""


@dataclass(slots=True, frozen=True)
class Load:
    """The requests of one level, all greedy.

    num_images: pictures a request. image_sizes: widths and heights in pixels, taken in turn.
    image_pool: how many different pictures there are, shown again and again; 0: no two are
    alike. prompt_words: random words before the question, other ones in each request.
    max_tokens: the length that is asked for; ignore_eos: also where the model would stop.
    """

    num_requests: int
    max_tokens: int = 64
    num_images: int = 1
    image_sizes: tuple[Size, ...] = ((224, 224),)
    image_pool: int = 0
    prompt_words: int = 0
    stream: bool = True
    ignore_eos: bool = False
    seed: int = 0


@dataclass(slots=True, frozen=True)
class Level:
    """One point of a sweep: requests open at once, or requests per second."""

    concurrency: int | None = None
    request_rate: float | None = None

    def __str__(self) -> str:
        if self.request_rate is not None:
            return f"{self.request_rate:g}/s"
        return f"{self.concurrency} at once"


@dataclass(slots=True, frozen=True)
class Slo:
    """What a request must keep to count as good; None: anything does.

    ttft_ms: time to its first text. itl_ms: the mean time between its tokens.
    """

    ttft_ms: float | None = None
    itl_ms: float | None = None

    @property
    def is_set(self) -> bool:
        return self.ttft_ms is not None or self.itl_ms is not None


@dataclass(slots=True, frozen=True)
class Sweep:
    """What to run. load: what every level sends, its num_requests and seed apart.

    num_requests: of each level; None: `default_requests`. num_warm_up: requests sent first, with
    pictures of their own. ignore_eos "auto" asks for it where the server takes it.
    """

    url: str
    levels: Sequence[Level]
    load: Load
    model: str | None = None
    api_key: str | None = None
    num_requests: int | None = None
    num_warm_up: int = 4
    ignore_eos: IgnoreEos = "auto"
    slo: Slo = field(default_factory=Slo)
    timeout_s: float = 600.0
