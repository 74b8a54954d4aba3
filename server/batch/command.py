"""The command `vlmserve run-batch`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from .requests import BatchError, BatchRequests, PictureFolder, RequestFile

console = Console(stderr=True, highlight=False)

EXIT_SOME_FAILED = 1
EXIT_ERROR = 2
KEY_VARIABLE = "VLMSERVE_API_KEY"


def run_batch(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="[IN.jsonl] OUT.jsonl",
            help="The requests, in the lines of OpenAI's batch API, and the file of the results. "
            "With --images only the file of the results.",
        ),
    ],
    images: Annotated[
        Path | None, typer.Option(help="Folder of pictures: one request for each. Needs --prompt.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The question about each picture.")] = None,
    fields: Annotated[
        str | None,
        typer.Option(
            metavar="JSON", help="Further fields of each picture's request, as a JSON object."
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            help="A running server, such as http://127.0.0.1:8000; its key is taken from "
            f"{KEY_VARIABLE}. Default: start one for this run."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="With --url: the model of requests that name none; default: the server's first. "
            "Without: the folder or hub id to serve; default: the bundled model."
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=1024, help="Requests at once.")] = 16,
    max_retries: Annotated[
        int, typer.Option(min=0, help="Times a request is sent again after 429, 503 or 504.")
    ] = 20,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds for one try.")] = 600.0,
    serve_option: Annotated[
        list[str] | None,
        typer.Option(
            help="Without --url: an option for `vlmserve serve`, such as --quantize=int8; "
            "repeatable."
        ),
    ] = None,
) -> None:
    """Send many requests and write their results.

    Run it again to go on after an interruption: requests with a result are skipped. Exits with 1
    if a request failed; its line has the error.
    """
    try:
        requests, out = _requests_of(files, images, prompt, fields)
        num_failed = asyncio.run(
            _run(requests, out, url, model, serve_option or [], concurrency, max_retries, timeout)
        )
    except BatchError as error:
        console.print(f"vlmserve: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(EXIT_ERROR) from error
    if num_failed:
        raise typer.Exit(EXIT_SOME_FAILED)


def _requests_of(
    files: list[Path], images: Path | None, prompt: str | None, fields: str | None
) -> tuple[BatchRequests, Path]:
    """The requests, and the file of the results. Raises BatchError."""
    if images is None:
        if prompt is not None or fields is not None:
            raise BatchError("--prompt and --fields need --images")
        if len(files) != 2:
            raise BatchError("name two files: the requests and the results")
        return RequestFile(files[0]), files[1]
    if prompt is None:
        raise BatchError("--images needs --prompt")
    if len(files) != 1:
        raise BatchError("with --images name one file, for the results")
    try:
        more = msgspec.json.decode(fields or "{}", type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise BatchError(f"--fields is no JSON object: {error}") from error
    return PictureFolder(images, prompt, more), files[0]


async def _run(
    requests: BatchRequests,
    out: Path,
    url: str | None,
    model: str | None,
    serve_options: list[str],
    concurrency: int,
    max_retries: int,
    timeout_s: float,
) -> int:
    """The number of requests that failed. Raises BatchError."""
    # Here, so that the other commands start without an HTTP client.
    from .private_server import private_server
    from .results import Results
    from .runner import BatchOptions
    from .runner import run_batch as run

    num_requests = requests.check()
    results = Results(out)
    async with AsyncExitStack() as stack:
        stack.callback(results.close)
        if url is None:
            arguments = [*([model] if model else []), *serve_options]
            address, key = await stack.enter_async_context(private_server(arguments))
            options = BatchOptions(address, key, None, concurrency, max_retries, timeout_s)
        else:
            key_of_user = os.environ.get(KEY_VARIABLE)
            options = BatchOptions(url, key_of_user, model, concurrency, max_retries, timeout_s)
        with _ProgressBar(num_requests) as show:
            counts = await run(requests, results, options, show)
    console.print(
        f"{counts.num_done:,} answered, {counts.num_failed:,} failed,"
        f" {counts.num_skipped:,} done before; results in {out}",
        markup=False,
        soft_wrap=True,
    )
    return counts.num_failed


class _ProgressBar:
    """A progress bar on a terminal; nothing elsewhere."""

    def __init__(self, total: int) -> None:
        from rich.progress import Progress, TimeRemainingColumn

        columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("requests", total=total)

    def __enter__(self) -> Callable[[Any], None]:
        self._bar.start()
        return self._show

    def __exit__(self, *exc_info: object) -> None:
        self._bar.stop()

    def _show(self, counts: Any) -> None:
        finished = counts.num_done + counts.num_failed + counts.num_skipped
        self._bar.update(self._task, completed=finished)
