"""Shows on stderr how many bytes of the weights have been read.

A bar on a terminal, lines elsewhere. Hooks into transformers' loop over weights.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from transformers.utils import logging as transformers_logging

from ..settings.byte_text import shown_bytes

LINE_INTERVAL_S = 10.0
_DESCRIPTION = "Loading weights"  # the name of transformers' loop


class ByteProgress:
    """A bar on a terminal, else a line every LINE_INTERVAL_S and one at the end."""

    def __init__(
        self,
        total_bytes: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._done = total_bytes, 0
        self._stream = stream or sys.stderr
        self._clock = clock
        self._begin = self._last_line = clock()
        self._bar: Progress | None = None
        if self._stream.isatty():
            self._bar = _bar(Console(file=self._stream))
            self._task = self._bar.add_task("loading weights", total=total_bytes)
            self._bar.start()

    def advance(self, num_bytes: int) -> None:
        """Count bytes that have been read and placed."""
        self._done = min(self._total, self._done + num_bytes)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif self._clock() - self._last_line >= LINE_INTERVAL_S:
            self._last_line = self._clock()
            percent = 100 * self._done // max(1, self._total)
            self._write_line(
                f"{shown_bytes(self._done)} of {shown_bytes(self._total)} ({percent} %)"
            )

    def close(self) -> None:
        """Remove the bar, or write the last line."""
        if self._bar is not None:
            self._bar.stop()
        else:
            seconds = self._clock() - self._begin
            self._write_line(f"{shown_bytes(self._done)} read in {seconds:.1f} s")

    def _write_line(self, text: str) -> None:
        self._stream.write(f"loading weights: {text}\n")
        self._stream.flush()


def _bar(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


@contextmanager
def shown(
    num_bytes: Mapping[str, int], make: Callable[[int], ByteProgress] = ByteProgress
) -> Iterator[None]:
    """Make transformers' loop over weights show bytes instead of its own bar.

    num_bytes: of each weight, by its name in the module.
    """
    progress = make(sum(num_bytes.values()))

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("desc") == _DESCRIPTION and args:
            return _counted(args[0], num_bytes, progress)
        return factory(*args, **kwargs)

    previous = transformers_logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)
        progress.close()


def _counted(
    items: Iterable[tuple[str, Any]], num_bytes: Mapping[str, int], progress: ByteProgress
) -> Iterator[tuple[str, Any]]:
    """The items; each counts as read when the next one is taken."""
    for name, mapping in items:
        yield name, mapping
        progress.advance(num_bytes.get(name, 0))
