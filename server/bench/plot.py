"""Draws levels as curves into a PNG. Needs matplotlib, from the extra `bench`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .settings import BenchError
from .summary import Summary

# panel title -> the curves in it: label and field
PANELS: dict[str, dict[str, str]] = {
    "output tokens/s": {"output tokens/s": "tokens_per_s"},
    "time to first token, ms": {"p50": "ttft_p50_ms", "p99": "ttft_p99_ms"},
    "between tokens, ms": {"p50": "inter_token_p50_ms", "p99": "inter_token_p99_ms"},
    "end to end, ms": {"p50": "end_to_end_p50_ms", "p99": "end_to_end_p99_ms"},
    "requests/s": {"succeeded": "requests_per_s", "within the SLO": "goodput_per_s"},
}


def check_can_plot(path: Path) -> None:
    """Raise BenchError, before anything is measured, if no plot can be written there."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchError("--plot needs matplotlib: pip install 'vlmserve[bench]'")
    if path.suffix.lower() != ".png":
        raise BenchError(f"--plot {path} must end in .png")
    if not path.absolute().parent.is_dir():
        raise BenchError(f"--plot {path}: there is no folder {path.absolute().parent}")


def plot(summaries: Sequence[Summary], path: Path, title: str) -> None:
    """Write one panel a figure, over concurrency or request rate, as a PNG."""
    # The object-oriented form: no display, no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(PANELS), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    ordered = sorted(summaries, key=_position)
    for axes, (name, curves) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        _panel(axes, name, curves, ordered)
    figure.savefig(path, format="png", dpi=120)


def plot_documents(documents: Mapping[str, Any], path: Path) -> None:
    """Write one row of panels for each result of a run, as a PNG; a column has one scale.

    documents: by the name of the row.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (4 * len(PANELS), 3.6 * len(documents))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(documents), len(PANELS), sharey="col", squeeze=False)
    for row, (label, document) in zip(rows, documents.items(), strict=True):
        levels: list[Any] = [SimpleNamespace(**level) for level in document["levels"]]
        ordered = sorted(levels, key=_position)
        for axes, (name, curves) in zip(row, PANELS.items(), strict=True):
            _panel(axes, name, curves, ordered)
        row[0].set_ylabel(label)
    figure.savefig(path, format="png", dpi=120)


def _panel(axes: Any, name: str, curves: dict[str, str], ordered: Sequence[Summary]) -> None:
    places = [_position(summary) for summary in ordered]
    for label, field in curves.items():
        values = [getattr(summary, field, None) for summary in ordered]
        if any(value is not None for value in values):
            known = [float("nan") if value is None else value for value in values]
            axes.plot(places, known, marker="o", label=label)
    axes.set_title(name, fontsize=10)
    is_rate = ordered[0].request_rate is not None
    axes.set_xlabel("requests/s offered" if is_rate else "requests at once")
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if len(curves) > 1 and axes.lines:
        axes.legend()


def _position(summary: Summary) -> float:
    return float(summary.request_rate or summary.concurrency or 0)
