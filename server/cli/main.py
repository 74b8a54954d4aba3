"""The command line: `vlmserve serve`, `chat`, `check`, `run-batch`, `bench` and `version`.

Parses, builds the settings, opens the socket and runs the supervisor. Never imports torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import typer

from ... import __version__
from ...models.settings.byte_text import shown_bytes
from ...models.settings.option_parser import GroupedHelp, command_of
from ...router.config import EngineConfig
from ...router.messages import EngineReady
from ...router.processes.logs import say, set_up_logging
from ..batch.command import run_batch
from ..bench.command import app as bench_app
from ..settings import ServerSettings
from ..supervisor.settings import SupervisorSettings
from ..supervisor.supervisor import Supervisor
from .build_settings import build_settings
from .byte_sizes import parse_bytes, parse_max_memory
from .chat import chat
from .check import check
from .environment import VariableError, adopt, without_effect
from .listener import ListenError, listen
from .model_source import ModelFilesError
from .start_options import GROUPS, StartOptions

# By metavar: the parser of the value.
PARSERS = {"BYTES": parse_bytes, "DEVICE=BYTES,...": parse_max_memory}

app = typer.Typer(
    name="vlmserve",
    help="An inference server for Llama-3.2-Vision (Mllama) with an OpenAI-compatible API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(bench_app, name="bench")
app.command()(run_batch)
app.command()(check)
app.command()(chat)


@app.callback()
def _root() -> None:
    """Keeps the name `serve` on the command line."""


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


class ServeCommand(GroupedHelp):
    """Takes `--ray` without an address as `--ray auto`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments."""
        for index, argument in enumerate(args):
            if argument == "--ray" and (args[index + 1 : index + 2] or ["-"])[0].startswith("-"):
                return super().parse_args(ctx, [*args[:index], "--ray=auto", *args[index + 1 :]])
        return super().parse_args(ctx, args)


@app.command(cls=ServeCommand)
@command_of(StartOptions, EngineConfig, ServerSettings, SupervisorSettings,
            groups=GROUPS, parsers=PARSERS)  # fmt: skip
def serve(values: dict[str, Any]) -> None:
    """Serve a model until Ctrl-C.

    An environment variable can set each option: VLMSERVE_MAX_IMAGES sets --max-images.
    """
    set_up_logging(values["log_level"], values["log_format"], "supervisor")
    for line in without_effect(os.environ, values):
        say(f"vlmserve: {line}", logging.WARNING)
    if values["ray"] is not None:
        _serve_on_ray(values)
        return
    try:
        settings = build_settings(values)
        start = settings.start
        listener = listen(start.host, start.port)
        port = start.metrics_port
        probes = None if port is None else listen(start.host, port, "--metrics-port")
    except (ModelFilesError, ListenError, ValueError) as error:
        say(f"vlmserve: {error}", logging.ERROR)
        raise typer.Exit(1) from error
    name = settings.server.model_name
    say(f"vlmserve {__version__}: loading {name}")
    scheme = "http" if settings.server.tls_certfile is None else "https"
    url = f"{scheme}://{_shown_host(start.host)}:{listener.getsockname()[1]}"
    if probes is not None:
        say(
            f"vlmserve: metrics on http://{_shown_host(start.host)}:{probes.getsockname()[1]}/metrics"
        )
    with listener, probes or contextlib.nullcontext():
        supervisor = Supervisor(
            settings.engine, settings.server, listener, partial(_say_ready, url, settings.server),
            settings.supervisor, probes,
        )  # fmt: skip
        raise typer.Exit(asyncio.run(supervisor.run()))


def _serve_on_ray(values: dict[str, Any]) -> None:
    if importlib.util.find_spec("ray") is None:
        say("vlmserve: --ray needs Ray: pip install 'vlmserve[ray]'", logging.ERROR)
        raise typer.Exit(1)
    if values["ray"] == "local":
        # Read when Ray is imported: all of its ports on loopback.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    from .on_ray import serve_on_ray  # imports Ray

    try:
        serve_on_ray(values["ray"], values)
    except (ValueError, ConnectionError, RuntimeError) as error:
        say(f"vlmserve: {error}", logging.ERROR)
        raise typer.Exit(1) from error


def _say_ready(url: str, settings: ServerSettings, infos: Sequence[EngineReady]) -> None:
    """Log what the processes may take, the URL, and the device and cache size of each engine."""
    say(f"vlmserve: {memory_line(settings, infos)}")
    shown = [
        f"{one.device} {one.dtype}, context {one.max_model_len:,}, room for "
        f"{one.num_text_tokens:,} text tokens and {one.num_image_tiles:,} image tiles"
        for one in infos
    ]
    if len(shown) > 1:
        shown = [f"replica {number}: {text}" for number, text in enumerate(shown)]
    say(f"vlmserve is ready on {url} (model {settings.model_name}, {'; '.join(shown)})")


def memory_line(settings: ServerSettings, infos: Sequence[EngineReady]) -> str:
    """How much of the machine's memory each process may take at most."""
    known = [shown_bytes(one.max_memory_bytes) for one in infos if one.max_memory_bytes]
    engines = [f"each engine {' and '.join(known)}, full queue included"] if known else []
    workers = settings.max_memory_bytes
    limits = [] if workers is None else [f"an HTTP worker {shown_bytes(workers)}"]
    images = settings.images
    decoders = f"each of its {images.num_decoders} image decoders"
    decoders += f" {shown_bytes(images.decoder_memory_bytes)} beyond its start"
    return "memory at most: " + "; ".join([*engines, *limits, decoders])


def _shown_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def main() -> None:
    """Entry point of the console script."""
    try:
        adopt(os.environ)
    except VariableError as error:
        say(f"vlmserve: {error}", logging.ERROR)
        sys.exit(1)
    app()
