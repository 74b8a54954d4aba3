"""The command line of `vlmserve bench serve`: option names, help, and what goes to which stream.

Tables and remarks go to stderr; stdout gets one JSON document, last.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import orjson
import typer
from rich.console import Console

from .settings import BenchError, IgnoreEos, Level, Load, Size, Slo, Sweep

if TYPE_CHECKING:
    from .sweep import Result

TARGET_PANEL = "Target"
SWEEP_PANEL = "Sweep"
LOAD_PANEL = "Load"
OUTPUT_PANEL = "Output"
DEFAULT_CONCURRENCY = "1,4,16"

app = typer.Typer(no_args_is_help=True, help="Measure a server.")
console = Console(stderr=True, highlight=False)


class EosChoice(StrEnum):
    """Whether answers go on where the model would end them."""

    auto = "auto"
    on = "on"
    off = "off"


@app.callback()
def _root() -> None:
    """Measure a server."""


@app.command()
def serve(
    url: Annotated[
        str, typer.Option(help="Base URL, with its /v1.", rich_help_panel=TARGET_PANEL)
    ] = "http://127.0.0.1:8000/v1",
    model: Annotated[
        str | None,
        typer.Option(help="Name in the API; default: its only one.", rich_help_panel=TARGET_PANEL),
    ] = None,
    api_key_env: Annotated[
        str,
        typer.Option(
            help="Environment variable that holds the API key, if one is needed.",
            rich_help_panel=TARGET_PANEL,
        ),
    ] = "VLMSERVE_API_KEY",
    timeout: Annotated[
        float,
        typer.Option(min=0.1, help="Seconds a request may take.", rich_help_panel=TARGET_PANEL),
    ] = 600.0,
    concurrency: Annotated[
        str | None,
        typer.Option(
            help=f"Requests open at once, a level each; default: {DEFAULT_CONCURRENCY}.",
            rich_help_panel=SWEEP_PANEL,
        ),
    ] = None,
    request_rate: Annotated[
        str | None,
        typer.Option(
            help="Requests a second, a level each, in place of --concurrency. They come at random "
            "times (Poisson) and wait for no answer; latencies count from when they were due.",
            rich_help_panel=SWEEP_PANEL,
        ),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Requests a level; default: 4 a user, or 30 s of the rate, and at least 8.",
            rich_help_panel=SWEEP_PANEL,
        ),
    ] = None,
    warm_up: Annotated[
        int,
        typer.Option(min=0, help="Short requests sent before.", rich_help_panel=SWEEP_PANEL),
    ] = 4,
    slo_ttft_ms: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Goodput counts requests whose first text comes within this.",
            rich_help_panel=SWEEP_PANEL,
        ),
    ] = None,
    slo_itl_ms: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Goodput counts requests whose mean time between tokens is within this.",
            rich_help_panel=SWEEP_PANEL,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(min=0, help="Of pictures, prompts and arrivals.", rich_help_panel=SWEEP_PANEL),
    ] = 0,
    images: Annotated[
        int, typer.Option(min=0, help="Pictures a request.", rich_help_panel=LOAD_PANEL)
    ] = 1,
    image_size: Annotated[
        str,
        typer.Option(
            help="Pixels, as 224 or 640x480; several, with commas, are taken in turn.",
            rich_help_panel=LOAD_PANEL,
        ),
    ] = "224",
    image_pool: Annotated[
        int,
        typer.Option(
            min=0,
            help="Different pictures, shown again and again; 0: no two are alike.",
            rich_help_panel=LOAD_PANEL,
        ),
    ] = 0,
    prompt_words: Annotated[
        int,
        typer.Option(
            min=0,
            help="Random words before the question, about a token each.",
            rich_help_panel=LOAD_PANEL,
        ),
    ] = 0,
    output_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens an answer (max_tokens).", rich_help_panel=LOAD_PANEL)
    ] = 64,
    ignore_eos: Annotated[
        EosChoice,
        typer.Option(
            help="Answer to the full length also where the model would stop; auto asks the server "
            "whether it takes the field.",
            rich_help_panel=LOAD_PANEL,
        ),
    ] = EosChoice.auto,
    stream: Annotated[
        bool,
        typer.Option(help="Stream; without, only end to end.", rich_help_panel=LOAD_PANEL),
    ] = True,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw the levels as a PNG.", rich_help_panel=OUTPUT_PANEL),
    ] = None,
) -> None:
    """Offer a load to an OpenAI-compatible server and measure what its clients see.

    A table goes to stderr, one JSON document to stdout.
    """
    sweep = Sweep(
        url=url,
        model=model,
        api_key=_api_key(api_key_env),
        levels=_levels(concurrency, request_rate),
        num_requests=requests,
        num_warm_up=warm_up,
        ignore_eos=_EOS[ignore_eos],
        slo=Slo(slo_ttft_ms, slo_itl_ms),
        timeout_s=timeout,
        load=Load(
            num_requests=0,
            max_tokens=output_tokens,
            num_images=images,
            image_sizes=_sizes(image_size),
            image_pool=image_pool,
            prompt_words=prompt_words,
            stream=stream,
            seed=seed,
        ),
    )
    try:
        result = _measure(sweep, plot_file)
    except BenchError as error:
        console.print(f"vlmserve: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    document = result.document(sweep, shlex.join(["vlmserve", *sys.argv[1:]]))
    typer.echo(orjson.dumps(document).decode())
    if not any(summary.requests for summary in result.summaries):
        raise typer.Exit(1)


def _measure(sweep: Sweep, plot_file: Path | None) -> Result:
    # Here, so that the other commands start without numpy and an HTTP client.
    from .plot import check_can_plot, plot
    from .report import LiveTable, warnings
    from .sweep import run_sweep

    if plot_file is not None:
        check_can_plot(plot_file)
    with LiveTable(console, f"{sweep.url}: {_load_in_words(sweep.load)}") as table:
        result = asyncio.run(run_sweep(sweep, table))
    for summary in result.summaries:
        for line in warnings(summary, sweep.load.max_tokens):
            console.print(f"note: {line}", markup=False, soft_wrap=True)
    if plot_file is not None:
        plot(result.summaries, plot_file, f"{result.model}: {_load_in_words(sweep.load)}")
        console.print(f"drawn to {plot_file}", markup=False, soft_wrap=True)
    return result


_EOS: dict[EosChoice, IgnoreEos] = {
    EosChoice.auto: "auto",
    EosChoice.on: "on",
    EosChoice.off: "off",
}


def _load_in_words(load: Load) -> str:
    sizes = ", ".join(f"{width}x{height}" for width, height in load.image_sizes)
    pool = f"of {load.image_pool} kinds" if load.image_pool else "all different"
    pictures = f"{load.num_images} picture(s) a request ({sizes}, {pool})"
    words = f", {load.prompt_words} words" if load.prompt_words else ""
    return f"{pictures if load.num_images else 'text only'}{words}, {load.max_tokens} tokens out"


def _api_key(name: str) -> str | None:
    """The first key in the variable, which may hold several for the server."""
    keys = os.environ.get(name, "").split()
    return keys[0] if keys else None


def _levels(concurrency: str | None, request_rate: str | None) -> list[Level]:
    if request_rate is not None:
        if concurrency is not None:
            raise typer.BadParameter("give --concurrency or --request-rate, not both")
        return [Level(request_rate=rate) for rate in _numbers(request_rate, "--request-rate")]
    levels = _numbers(concurrency or DEFAULT_CONCURRENCY, "--concurrency")
    if any(level != int(level) for level in levels):
        raise typer.BadParameter(f"--concurrency {concurrency!r}: give whole numbers")
    return [Level(concurrency=int(level)) for level in levels]


def _numbers(text: str, option: str) -> list[float]:
    """Positive numbers with commas between them."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < 1e6 for number in numbers):
        raise typer.BadParameter(f"{option} {text!r}: give numbers above 0, such as 1,4,16")
    return numbers


def _sizes(text: str) -> tuple[Size, ...]:
    sizes = []
    for part in text.split(","):
        sides = part.strip().lower().split("x")
        numbers = [int(side) for side in sides if side.isascii() and side.isdigit()]
        if len(numbers) != len(sides) or not 1 <= len(sides) <= 2 or not _is_drawable(numbers):
            raise typer.BadParameter(
                f"--image-size {part!r}: give 16 to 8192 pixels a side, such as 224 or 640x480"
            )
        sizes.append((numbers[0], numbers[-1]))
    return tuple(sizes)


def _is_drawable(sides: list[int]) -> bool:
    return all(16 <= side <= 8192 for side in sides)
