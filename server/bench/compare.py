"""Compares two results of `vlmserve bench serve`: ratios level by level, and a plot side by side.

Owns which figures are compared and in which direction one is better. Measures nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .settings import BenchError

# Field of a level -> heading. Of the first ones more is better, of the others less.
MORE_IS_BETTER = {
    "tokens_per_s": "tokens/s",
    "requests_per_s": "requests/s",
    "goodput_per_s": "goodput/s",
}
LESS_IS_BETTER = {
    "ttft_p50_ms": "TTFT p50",
    "ttft_p99_ms": "TTFT p99",
    "inter_token_p50_ms": "token p50",
    "inter_token_p99_ms": "token p99",
    "end_to_end_p50_ms": "total p50",
    "end_to_end_p99_ms": "total p99",
}
FIGURES = MORE_IS_BETTER | LESS_IS_BETTER
# What two results should have in common; a difference is a note, not an error.
SAME = ("model", "load", "slo", "client")


@dataclass(slots=True, frozen=True)
class Pair:
    """One level of both results. ratios: B divided by A, by field; None where one lacks it."""

    level: str
    a: Mapping[str, Any]
    b: Mapping[str, Any]

    @property
    def ratios(self) -> dict[str, float | None]:
        return {name: _ratio(self.a.get(name), self.b.get(name)) for name in FIGURES}


def read_result(path: Path) -> dict[str, Any]:
    """The document of a run. Raises BenchError if the file is not one."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"cannot read {path}: {error}") from error
    try:
        document = json.loads(text)
    except ValueError as error:
        raise BenchError(f"{path} is not JSON: {error}") from error
    levels = document.get("levels") if isinstance(document, dict) else None
    if not isinstance(levels, list) or not all(isinstance(level, dict) for level in levels):
        raise BenchError(f"{path} is not a result of vlmserve bench serve: it has no levels")
    return document


def pairs_of(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Pair]:
    """The levels that both results have, in A's order. Raises BenchError if there is none."""
    of_b = {_level(one): one for one in b["levels"]}
    pairs = [
        Pair(_level(one), one, of_b[_level(one)]) for one in a["levels"] if _level(one) in of_b
    ]
    if not pairs:
        raise BenchError(
            "the results have no level in common: run both with the same --concurrency or "
            "--request-rate"
        )
    return pairs


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Settings that differ, so that the ratios compare more than the servers."""
    flat_a, flat_b = _flat(a), _flat(b)
    return [
        f"{name} differs: {flat_a.get(name)} and {flat_b.get(name)}"
        for name in sorted(flat_a.keys() | flat_b.keys())
        if flat_a.get(name) != flat_b.get(name)
    ]


def table_of(pairs: Sequence[Pair], names: tuple[str, str]) -> Table:
    """The ratios as a table. names: of A and B."""
    table = Table(title=f"{names[1]} divided by {names[0]}", box=SIMPLE_HEAD, title_justify="left")
    table.add_column("load")
    shown = [name for name in FIGURES if any(pair.ratios[name] is not None for pair in pairs)]
    for name in shown:
        table.add_column(FIGURES[name], justify="right")
    for pair in pairs:
        table.add_row(pair.level, *(_shown(name, pair.ratios[name]) for name in shown))
    return table


def document_of(pairs: Sequence[Pair], notes: Sequence[str]) -> dict[str, Any]:
    """The comparison as JSON."""
    return {"notes": list(notes), "levels": [{"level": one.level} | one.ratios for one in pairs]}


def _flat(document: Mapping[str, Any]) -> dict[str, object]:
    """The settings that should be the same: "load.max_tokens" and so on."""
    flat: dict[str, object] = {}
    for name in SAME:
        value = document.get(name)
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat


def _level(level: Mapping[str, Any]) -> str:
    rate = level.get("request_rate")
    return f"{rate:g}/s" if rate is not None else f"{level.get('concurrency')} at once"


def _ratio(a: object, b: object) -> float | None:
    if not isinstance(a, int | float) or not isinstance(b, int | float) or not a:
        return None
    return b / a


def _shown(name: str, ratio: float | None) -> str:
    if ratio is None:
        return "-"
    is_better = ratio > 1 if name in MORE_IS_BETTER else ratio < 1
    style = "" if abs(ratio - 1) < 0.02 else "green" if is_better else "red"
    return f"[{style}]{ratio:.2f}[/]" if style else f"{ratio:.2f}"
