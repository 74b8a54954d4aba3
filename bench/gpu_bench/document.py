"""The document of a run, and the aims that its rows are held to.

Owns the document's fields and its file. Knows nothing of processes or of how a row is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .plan import DECODE, INT8, PLAIN, Row

FILE, LOG_FILE = "gpu.json", "gpu.log"
# of each process's log that are kept
LOG_CHARACTERS = 200_000
OK, FAILED, DROPPED, NOT_AVAILABLE = "ok", "failed", "dropped", "not available"

# the aims: at least so much
BOUND_SHARE, INT8_SPEEDUP, TOKENS_PER_S, MANY = 0.85, 1.6, 5000.0, 64


@dataclass
class Document:
    """All that a run has told so far; saved after every change, so that a cut run leaves it."""

    folder: Path
    settings: dict[str, Any]
    machine: dict[str, Any] = field(default_factory=dict)
    bandwidth: dict[str, dict[str, Any]] = field(default_factory=dict)
    runners: dict[str, dict[str, Any]] = field(default_factory=dict)
    tests: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, row: Row, status: str, **figures: Any) -> None:
        """Take a row in, print it, save."""
        entry = {
            "row": row.id,
            "kind": row.kind,
            "quantize": row.quantize,
            "mode": row.mode,
            "content": "image" if row.has_image else "text",
            "batch": row.batch,
            "status": status,
            **figures,
        }
        self.rows.append(entry)
        print(line_of(entry), flush=True)
        self.save()

    def save(self) -> None:
        """Write the file anew, whole or not at all."""
        file = self.folder / FILE
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps(self.content(), indent=1) + "\n", encoding="utf-8")
        fresh.replace(file)

    def keep_logs(self, scratch: Path) -> None:
        """Write the ends of all processes' logs to one file beside the document's."""
        parts = []
        for log in sorted(scratch.rglob("*.log")):
            end = log.read_text("utf-8", "replace")[-LOG_CHARACTERS:]
            parts.append(f"==> {log.name} <==\n{end}\n")
        (self.folder / LOG_FILE).write_text("\n".join(parts), encoding="utf-8")

    def content(self) -> dict[str, Any]:
        """What is written, and printed last."""
        return {
            "benchmark": "gpu",
            "machine": self.machine,
            "settings": self.settings,
            "bandwidth": self.bandwidth,
            "runners": self.runners,
            "aims": aims(self.rows),
            "tests": self.tests,
            "rows": self.rows,
            "notes": self.notes,
            "seconds": round(self.seconds, 1),
        }

    @property
    def is_good(self) -> bool:
        """Whether nothing failed and something was measured. Aims that are missed do not count."""
        statuses = {row["status"] for row in self.rows}
        has_failed = FAILED in statuses or bool(self.tests.get("failed"))
        return OK in statuses and not has_failed and not self.notes


def line_of(entry: dict[str, Any]) -> str:
    """A row as one line to read."""
    text = f"{entry['row']:<34}"
    if entry["status"] != OK:
        why = str(entry.get("error") or entry.get("why") or "").strip().splitlines()
        return f"{text} {entry['status']}{': ' + why[-1] if why else ''}"
    shown = {
        "step_ms": "{:9.3f} ms",
        "encode_ms": "{:9.2f} ms an image",
        "tokens_per_s": "{:10.0f} tokens/s",
        "share_of_bound": "{:7.1%} of the bound",
    }
    parts = [form.format(entry[name]) for name, form in shown.items() if entry.get(name)]
    return " ".join([text, *parts])


def aims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each aim with its value, of the better mode; passed is null where it was not measured."""
    alone = _best(rows, PLAIN, 1, "share_of_bound")
    plain = _best(rows, PLAIN, 1, "tokens_per_s")
    quantized = _best(rows, INT8, 1, "tokens_per_s")
    many = max(
        (one for kind in (PLAIN, INT8) if (one := _best(rows, kind, MANY, "tokens_per_s"))),
        default=None,
    )
    speedup = quantized / plain if plain and quantized else None
    return [
        _aim("share of the bound, one sequence, text, 16 bits", alone, BOUND_SHARE),
        _aim("int8 over 16 bits, one sequence, text", speedup, INT8_SPEEDUP),
        _aim(f"tokens/s, {MANY} sequences, text", many, TOKENS_PER_S),
    ]


def _best(rows: list[dict[str, Any]], quantize: str, batch: int, name: str) -> float | None:
    wanted = {"kind": DECODE, "content": "text", "status": OK, "quantize": quantize, "batch": batch}
    found = [row[name] for row in rows if wanted.items() <= row.items()]
    return max(found, default=None)


def _aim(what: str, value: float | None, least: float) -> dict[str, Any]:
    passed = None if value is None else value >= least
    value = None if value is None else round(value, 4)
    return {"aim": what, "at_least": least, "value": value, "passed": passed}


def asked(command: list[str], folder: Path) -> str:
    """The first line that a command prints; empty where it cannot be had."""
    run: Callable[..., Any] = subprocess.run
    try:
        done = run(command, cwd=folder, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else ""


def commit_of(root: Path) -> str:
    """The commit that is measured: git's word, the variable COMMIT where there is no git."""
    found = asked(["git", "rev-parse", "--short", "HEAD"], root)
    if not found:
        return os.environ.get("COMMIT", "unknown")
    is_clean = not asked(["git", "status", "--porcelain", "--untracked-files=no"], root)
    return found if is_clean else f"{found}, changed"


def base_machine(root: Path) -> dict[str, Any]:
    """What is known of the machine without torch; the measuring processes add the rest."""
    query = "name,driver_version,clocks.max.sm,clocks.max.mem,memory.total"
    return {
        "commit": commit_of(root),
        "command": " ".join(["python", *sys.argv]),
        "python": sys.version.split()[0],
        "cores": len(os.sched_getaffinity(0)),
        "nvidia_smi": asked(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], root),
    }
