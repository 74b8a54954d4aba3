"""The commands `vlmserve bench serve` and `bench compare`: from options to work, and the output.

Tables and notes go to stderr; stdout gets one JSON document at the end.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer
from rich.console import Console

from ...models.settings.option_parser import GroupedHelp, command_of, settings_from
from .settings import (
    DEFAULT_CONCURRENCY,
    GROUPS,
    BenchError,
    BenchOptions,
    Level,
    Load,
    Size,
    Sweep,
)

if TYPE_CHECKING:
    from .sweep import Result

app = typer.Typer(no_args_is_help=True, help="Measure a server.")
console = Console(stderr=True, highlight=False)


@app.callback()
def _root() -> None:
    """Measure a server."""


@app.command(cls=GroupedHelp)
@command_of(Sweep, BenchOptions, groups=GROUPS, parsers={}, has_variables=False)
def serve(values: dict[str, Any]) -> None:
    """Send requests to an OpenAI-compatible server and measure what its clients see.

    Prints a table to stderr and one JSON document to stdout.
    """
    options, sweep = settings_from(BenchOptions, values), _sweep(values)
    try:
        result = _measure(sweep, options.plot)
    except BenchError as error:
        console.print(f"vlmserve: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    document = result.document(sweep, shlex.join(["vlmserve", *sys.argv[1:]]))
    typer.echo(orjson.dumps(document).decode())
    if not any(summary.requests for summary in result.summaries):
        raise typer.Exit(1)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Result of bench serve to compare with.")],
    b: Annotated[Path, typer.Argument(help="Result that is divided by the first.")],
    plot: Annotated[
        Path | None, typer.Option(help="Draw both, one above the other, to this PNG file.")
    ] = None,
) -> None:
    """Compare two results of bench serve level by level: B divided by A.

    Prints a table to stderr and one JSON document to stdout.
    """
    from .compare import differences, document_of, pairs_of, read_result, table_of
    from .plot import check_can_plot, plot_documents

    try:
        if plot is not None:
            check_can_plot(plot)
        first, second = read_result(a), read_result(b)
        pairs = pairs_of(first, second)
    except BenchError as error:
        console.print(f"vlmserve: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    notes = differences(first, second)
    console.print(table_of(pairs, (a.name, b.name)))
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    if plot is not None:
        plot_documents({f"A: {a.name}": first, f"B: {b.name}": second}, plot)
        console.print(f"wrote {plot}", markup=False, soft_wrap=True)
    typer.echo(orjson.dumps(document_of(pairs, notes)).decode())


def _sweep(values: Mapping[str, Any]) -> Sweep:
    options = settings_from(BenchOptions, values)
    sizes = _sizes(options.image_size)
    return settings_from(
        Sweep,
        values,
        api_key=_api_key(options.api_key_env),
        levels=_levels(options.concurrency, options.request_rate),
        load=settings_from(Load, values, image_sizes=sizes, ignore_eos=False),
    )


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
        console.print(f"wrote {plot_file}", markup=False, soft_wrap=True)
    return result


def _load_in_words(load: Load) -> str:
    sizes = ", ".join(f"{width}x{height}" for width, height in load.image_sizes)
    pool = f"{load.image_pool} different" if load.image_pool else "all different"
    pictures = f"{load.num_images} image(s) per request ({sizes}, {pool})"
    words = f", {load.prompt_words} words" if load.prompt_words else ""
    return f"{pictures if load.num_images else 'text only'}{words}, {load.max_tokens} tokens out"


def _api_key(name: str) -> str | None:
    """The first key in the variable; the server may use several."""
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
