"""The command line: `vlmserve serve`.

Owns option names, help and the lines an operator reads. Knows nothing of how
requests are served; never imports torch.
"""

from __future__ import annotations

import asyncio
import os
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console

from .. import __version__
from ..router.config import EngineConfig
from ..router.messages import EngineReady
from .images.settings import ImageSettings
from .model_files import ModelFilesError, resolve_model
from .settings import ServerSettings
from .supervisor import ListenError, Supervisor, listen

MODEL_PANEL = "Model"
ENGINE_PANEL = "Engine"
HTTP_PANEL = "HTTP"

app = typer.Typer(
    name="vlmserve",
    help="An inference server for Llama-3.2-Vision (Mllama) with an OpenAI-compatible API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(stderr=True, highlight=False)


class Dtype(StrEnum):
    """Compute types; auto is bfloat16 where the device has its instructions."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class ImagePosition(StrEnum):
    """Where a user message's images stand in its prompt."""

    front = "front"
    as_sent = "as-sent"


class UnknownFields(StrEnum):
    """What a request field that the API does not have leads to."""

    error = "error"
    ignore = "ignore"


@app.callback()
def _root() -> None:
    """Keeps `serve` a named command although it is one of few."""


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="A model folder or hub id; nothing serves the small bundled model."),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of a hub id.", rich_help_panel=MODEL_PANEL),
    ] = None,
    served_model_name: Annotated[
        str | None,
        typer.Option(
            help="Name in the API; default: the hub id or the folder's name.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None,
    dtype: Annotated[
        Dtype,
        typer.Option(
            help="Compute type; auto is bfloat16 where the device has it, else float32.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = Dtype.auto,
    device: Annotated[
        str,
        typer.Option(
            help="auto, cpu, cuda or cuda:N; auto is CUDA where there is one.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = "auto",
    max_model_len: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Longest prompt plus answer, in tokens; default: the model's own.",
            rich_help_panel=ENGINE_PANEL,
        ),
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option(min=1, help="Requests that run at once.", rich_help_panel=ENGINE_PANEL)
    ] = 64,
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens in one step.", rich_help_panel=ENGINE_PANEL)
    ] = 2048,
    max_num_batched_images: Annotated[
        int,
        typer.Option(min=1, help="Most images encoded in one step.", rich_help_panel=ENGINE_PANEL),
    ] = 4,
    kv_cache_bytes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Memory for keys and values of text and images; default: from what is free.",
            rich_help_panel=ENGINE_PANEL,
        ),
    ] = None,
    num_image_blocks: Annotated[
        int | None,
        typer.Option(
            min=1, help="Image tiles that fit the cache at once.", rich_help_panel=ENGINE_PANEL
        ),
    ] = None,
    prefix_cache: Annotated[
        bool,
        typer.Option(
            help="Keep computed text for prompts that begin alike.", rich_help_panel=ENGINE_PANEL
        ),
    ] = True,
    image_cache: Annotated[
        bool,
        typer.Option(
            help="Keep encoded pictures for whoever sends them again.",
            rich_help_panel=ENGINE_PANEL,
        ),
    ] = True,
    num_threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="CPU threads of the model; default: the cores that are left, or OMP_NUM_THREADS.",
            rich_help_panel=ENGINE_PANEL,
        ),
    ] = None,
    max_queue_requests: Annotated[
        int,
        typer.Option(
            min=1, help="Requests that may wait; beyond that 429.", rich_help_panel=ENGINE_PANEL
        ),
    ] = 256,
    max_queue_tokens: Annotated[
        int,
        typer.Option(min=1, help="Prompt tokens that may wait.", rich_help_panel=ENGINE_PANEL),
    ] = 1_048_576,
    max_queue_bytes: Annotated[
        int,
        typer.Option(min=1, help="Bytes of images that may wait.", rich_help_panel=ENGINE_PANEL),
    ] = 1_073_741_824,
    host: Annotated[
        str, typer.Option(help="Address to listen on.", rich_help_panel=HTTP_PANEL)
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, help="Port; 0 picks a free one.", rich_help_panel=HTTP_PANEL
        ),
    ] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Key that clients must send; may be given several times. "
            "The environment variable keeps it out of the process list.",
            envvar="VLMSERVE_API_KEY",
            rich_help_panel=HTTP_PANEL,
        ),
    ] = None,
    image_position: Annotated[
        ImagePosition,
        typer.Option(
            help="front moves a message's images before its text, where the text can see them.",
            rich_help_panel=HTTP_PANEL,
        ),
    ] = ImagePosition.front,
    max_images: Annotated[
        int, typer.Option(min=1, help="Images in one request.", rich_help_panel=HTTP_PANEL)
    ] = 16,
    allow_private_image_urls: Annotated[
        bool,
        typer.Option(
            "--allow-private-image-urls",
            help="Fetch images from private and loopback addresses too: only where every client "
            "is trusted.",
            rich_help_panel=HTTP_PANEL,
        ),
    ] = False,
    unknown_fields: Annotated[
        UnknownFields,
        typer.Option(
            help="Answer unknown request fields with 400, or ignore and log them.",
            rich_help_panel=HTTP_PANEL,
        ),
    ] = UnknownFields.error,
) -> None:
    """Serve a model until Ctrl-C."""
    try:
        folder = resolve_model(model, revision)
        listener = listen(host, port)
    except (ModelFilesError, ListenError) as error:
        raise _failure(str(error)) from error
    port = listener.getsockname()[1]
    name = served_model_name or folder.name
    engine = EngineConfig(
        model=str(folder.path),
        socket_path="",
        device=device,
        dtype=dtype.value,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_batched_images=max_num_batched_images,
        kv_cache_bytes=kv_cache_bytes,
        num_image_blocks=num_image_blocks,
        prefix_cache=prefix_cache,
        image_cache=image_cache,
        num_threads=num_threads,
        max_queue_requests=max_queue_requests,
        max_queue_tokens=max_queue_tokens,
        max_queue_bytes=max_queue_bytes,
        parent_pid=os.getpid(),
    )
    settings = ServerSettings(
        model=str(folder.path),
        engine_socket="",
        served_model_names=[name],
        api_keys=api_key or [],
        max_num_seqs=max_num_seqs,
        images=ImageSettings(
            max_images=max_images, allow_private_addresses=allow_private_image_urls
        ),
        image_position="front" if image_position is ImagePosition.front else "as-sent",
        unknown_fields="error" if unknown_fields is UnknownFields.error else "ignore",
    )
    console.print(f"vlmserve {__version__}: loading {name}", markup=False)

    def say_ready(info: EngineReady) -> None:
        _say_ready(f"http://{_shown_host(host)}:{port}", name, info)

    with listener:
        supervisor = Supervisor(engine, settings, listener, say_ready)
        raise typer.Exit(asyncio.run(supervisor.run()))


def _say_ready(url: str, name: str, info: EngineReady) -> None:
    console.print(
        f"vlmserve is ready on {url} (model {name}, {info.device} {info.dtype}, "
        f"context {info.max_model_len}, room for {info.num_text_tokens} text tokens "
        f"and {info.num_image_tiles} image tiles)",
        markup=False,
        soft_wrap=True,
    )


def _shown_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _failure(line: str) -> typer.Exit:
    console.print(f"vlmserve: {line}", markup=False, soft_wrap=True)
    return typer.Exit(1)


def main() -> None:
    """Entry point of the console script."""
    app()
