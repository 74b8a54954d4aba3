"""What a benchmark sends and where: types, defaults, bounds and command-line options.

Imports neither numpy nor an HTTP client, so that the command line starts fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from ...models.settings.option import Option

Size = tuple[int, int]
IgnoreEos = Literal["auto", "on", "off"]

TARGET, SWEEP, LOAD, OUTPUT = "Target", "Sweep", "Load", "Output"
# The order of the headings in --help.
GROUPS = (TARGET, SWEEP, LOAD, OUTPUT)
DEFAULT_CONCURRENCY = "1,4,16"

NonNegative = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0.0)]


class BenchError(Exception):
    """The load cannot be sent. The message is one line with the remedy."""


@dataclass(slots=True, frozen=True)
class Load:
    """The requests of one level, all greedy.

    image_sizes: widths and heights in pixels, used in turn. ignore_eos: continue each answer to
    max_tokens.
    """

    num_requests: int = 0
    max_tokens: Annotated[
        Positive, Option("Tokens per answer (max_tokens).", LOAD, name="output-tokens")
    ] = 64
    num_images: Annotated[NonNegative, Option("Images per request.", LOAD, name="images")] = 1
    image_sizes: tuple[Size, ...] = ((224, 224),)
    image_pool: Annotated[
        NonNegative, Option("Number of different images, reused in turn; 0: all differ.", LOAD)
    ] = 0
    prompt_words: Annotated[
        NonNegative, Option("Random words before the question; about one token each.", LOAD)
    ] = 0
    stream: Annotated[
        bool, Option("Stream answers; without streaming, only total times are measured.", LOAD)
    ] = True
    ignore_eos: bool = False
    seed: Annotated[NonNegative, Option("Seed of images, prompts and arrival times.", SWEEP)] = 0


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
    """The limits that a request must meet to count for goodput; None: no limit."""

    ttft_ms: Annotated[
        Milliseconds | None,
        Option(
            "Goodput counts requests whose first text arrives within this time.",
            SWEEP,
            name="slo-ttft-ms",
        ),
    ] = None
    itl_ms: Annotated[
        Milliseconds | None,
        Option(
            "Goodput counts requests whose mean time between tokens is within this.",
            SWEEP,
            name="slo-itl-ms",
        ),
    ] = None

    @property
    def is_set(self) -> bool:
        return self.ttft_ms is not None or self.itl_ms is not None


@dataclass(slots=True, frozen=True, kw_only=True)
class Sweep:
    """What to run. load: the requests of every level, without their number and seed.

    num_requests: per level; None: `default_requests`. num_warm_up: requests sent first, with other
    images. ignore_eos "auto" sets the field if the server accepts it.
    """

    url: Annotated[str, Option("Base URL, including /v1.", TARGET)] = "http://127.0.0.1:8000/v1"
    model: Annotated[
        str | None, Option("Model name in the API. Default: the server's only model.", TARGET)
    ] = None
    api_key: str | None = None
    timeout_s: Annotated[
        Annotated[float, msgspec.Meta(ge=0.1)], Option("Maximum seconds per request.", TARGET)
    ] = 600.0
    levels: Sequence[Level]
    num_requests: Annotated[
        Positive | None,
        Option(
            "Requests per level. Default: 4 per concurrent request, or 30 s of the rate; at "
            "least 8.",
            SWEEP,
            name="requests",
        ),
    ] = None
    num_warm_up: Annotated[
        NonNegative, Option("Short requests to send before the first level.", SWEEP, name="warm-up")
    ] = 4
    slo: Slo = field(default_factory=Slo)
    load: Load
    ignore_eos: Annotated[
        IgnoreEos,
        Option(
            "Continue answers to the full length even if the model would stop. auto: if the "
            "server accepts the field.",
            LOAD,
        ),
    ] = "auto"


@dataclass(slots=True, frozen=True)
class BenchOptions:
    """Options that the command turns into fields of `Sweep`, and its output file."""

    api_key_env: Annotated[
        str, Option("Environment variable with the API key, if the server needs one.", TARGET)
    ] = "VLMSERVE_API_KEY"
    concurrency: Annotated[
        str | None,
        Option(
            f"Concurrent requests, one level per number. Default: {DEFAULT_CONCURRENCY}.", SWEEP
        ),
    ] = None
    request_rate: Annotated[
        str | None,
        Option(
            "Requests per second, one level per number, instead of --concurrency. Arrival times "
            "are random (Poisson) and do not wait for answers; latency counts from the scheduled "
            "arrival.",
            SWEEP,
        ),
    ] = None
    image_size: Annotated[
        str,
        Option("Pixels, as 224 or 640x480; several, separated by commas, are used in turn.", LOAD),
    ] = "224"
    plot: Annotated[Path | None, Option("Draw the levels to this PNG file.", OUTPUT)] = None
