"""A server for one run: behind a random key, ended with the run."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import typer

from ..children.private_server import PrivateServer, PrivateServerError
from .requests import BatchError


@asynccontextmanager
async def private_server(arguments: Sequence[str]) -> AsyncIterator[tuple[str, str]]:
    """The URL and the key of a server that is ready; it stops when the block ends.

    arguments: of `vlmserve serve`. It ends with this process, also if that is killed.
    Raises BatchError with the server's last line if it does not start.
    """
    key = secrets.token_urlsafe(32)
    try:
        server = await PrivateServer.start(
            [*arguments, "--no-log-requests"], {"VLMSERVE_API_KEY": key}, _log
        )
    except PrivateServerError as error:
        raise BatchError(str(error)) from error
    try:
        yield server.url, key
    finally:
        await server.stop()


def _log(line: str) -> None:
    typer.echo(line, err=True)
