"""Shows the levels of a run as a live table. Knows nothing of how figures are computed."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from .client import Sample
from .settings import Level
from .summary import Summary

REFRESHES_PER_S = 2.0
# Width in characters if stderr is not a terminal.
FILE_WIDTH = 120
# Fits a terminal of 80 columns.
COLUMNS = (
    "load",
    "ok",
    "fail",
    "tokens\n/s",
    "requests\n/s",
    "goodput\n/s",
    "TTFT ms\np50 / p99",
    "token ms\np50 / p99",
    "total ms\np50 / p99",
)


class LiveTable:
    """A table on stderr: one row per finished level, and one for the running level.

    token ms: between two tokens. total ms: from the request to the end of the answer. If stderr is
    not a terminal, the table is written once, at the end.
    """

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._summaries: list[Summary] = []
        self._level: Level | None = None
        self._num_requests = 0
        self._done = self._failed = self._tokens = 0
        self._started = time.perf_counter()
        self._live = Live(
            console=console, get_renderable=self._table, refresh_per_second=REFRESHES_PER_S
        )

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._level = None
        if self._console.is_terminal:
            self._live.stop()
        elif self._summaries:
            Console(file=self._console.file, width=FILE_WIDTH).print(self._table())

    def start(self, level: Level, num_requests: int) -> None:
        """Show the level as running."""
        self._level, self._num_requests = level, num_requests
        self._done = self._failed = self._tokens = 0
        self._started = time.perf_counter()

    def take(self, sample: Sample) -> None:
        """Count a request that ended."""
        self._done += 1
        self._failed += sample.error is not None
        self._tokens += sample.completion_tokens

    def finish(self, summary: Summary) -> None:
        """Replace the running row with the level's figures."""
        self._level = None
        self._summaries.append(summary)

    def _table(self) -> Table:
        table = Table(
            title=self._title,
            title_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        for name in COLUMNS:
            table.add_column(name, justify="right", no_wrap=True)
        for summary in self._summaries:
            table.add_row(*cells(summary))
        if self._level is not None:
            table.add_row(*self._running_cells(), style="dim")
        return table

    def _running_cells(self) -> list[str]:
        rate = self._tokens / max(time.perf_counter() - self._started, 1e-9)
        done = f"{self._done} of {self._num_requests}"
        return [str(self._level), done, str(self._failed), f"{rate:.1f}"]


def cells(summary: Summary) -> list[str]:
    """A level's row."""
    level = Level(summary.concurrency, summary.request_rate)
    pairs = (
        (summary.ttft_p50_ms, summary.ttft_p99_ms),
        (summary.inter_token_p50_ms, summary.inter_token_p99_ms),
        (summary.end_to_end_p50_ms, summary.end_to_end_p99_ms),
    )
    goodput = summary.goodput_per_s
    return [
        str(level),
        str(summary.requests),
        str(summary.errors),
        f"{summary.tokens_per_s:.1f}",
        f"{summary.requests_per_s:.2f}",
        "-" if goodput is None else f"{goodput:.2f}",
        *(f"{_short(low)} / {_short(high)}" for low, high in pairs),
    ]


def _short(milliseconds: float | None) -> str:
    if milliseconds is None:
        return "-"
    return f"{milliseconds:.1f}" if milliseconds < 100 else f"{milliseconds:,.0f}"


def warnings(summary: Summary, max_tokens: int) -> list[str]:
    """Reasons not to trust a level's figures as they are."""
    level, notes = Level(summary.concurrency, summary.request_rate), []
    if not summary.is_equal_length and summary.requests:
        shortest, longest = summary.output_lengths[0], summary.output_lengths[-1]
        notes.append(
            f"{level}: answers have {shortest} to {longest} tokens instead of {max_tokens}: "
            "compare only with runs of the same lengths"
        )
    if not summary.is_counted_by_server:
        notes.append(f"{level}: the server sends no usage, so each piece of text counts as a token")
    if summary.client_cpu > 0.8:
        notes.append(
            f"{level}: this client used {summary.client_cpu:.0%} of a core, so it may limit the "
            "figures: send less, or use several clients"
        )
    for kind, count in summary.errors_by_kind.items():
        notes.append(f"{level}: {count} of {summary.requests + summary.errors} failed: {kind}")
    return notes
