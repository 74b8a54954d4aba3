"""The document of a run, and the aims that its rows are compared with.

Owns the document's fields and its file. Knows nothing of processes or of how a row is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .plan import CHUNK, DECODE, INT8, PLAIN, Row

FILE, LOG_FILE = "gpu.json", "gpu.log"
# kept of each process's log
LOG_CHARACTERS = 200_000
OK, FAILED, DROPPED, NOT_AVAILABLE = "ok", "failed", "dropped", "not available"
# the aims: at least these values
BOUND_SHARE, INT8_SPEEDUP, TOKENS_PER_S, MANY = 0.85, 1.6, 5000.0, 64
CHUNK_SHARE = round(1 / 1.3, 4)
SHOWN = {
    "step_ms": "{:9.3f} ms",
    "encode_ms": "{:9.2f} ms an image",
    "tokens_per_s": "{:10.0f} tokens/s",
    "share_of_bound": "{:7.1%} of the bound",
    "idle_ms": "{:7.3f} ms idle",
    "estimate_ms": "({:.2f} ms estimated)",
}


@dataclass
class Document:
    """All that a run has found so far; saved after every change, so that a cut run keeps it."""

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
        """Add a row, print it, save."""
        entry = {"row": row.id, "content": "image" if row.has_image else "text", "status": status}
        entry |= {
            name: getattr(row, name) for name in ("kind", "quantize", "mode", "batch", "load")
        }
        self.rows.append(entry | figures)
        print(line_of(self.rows[-1]), flush=True)
        self.save()

    def save(self) -> None:
        """Replace the file as a whole."""
        file = self.folder / FILE
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps(self.content(), indent=1) + "\n", encoding="utf-8")
        fresh.replace(file)

    def keep_logs(self, scratch: Path) -> None:
        """Write the ends of all processes' logs to one file beside the document's."""
        logs = [(log.name, log.read_text("utf-8", "replace")) for log in scratch.rglob("*.log")]
        parts = [f"==> {name} <==\n{text[-LOG_CHARACTERS:]}\n" for name, text in sorted(logs)]
        (self.folder / LOG_FILE).write_text("\n".join(parts), encoding="utf-8")

    def content(self) -> dict[str, Any]:
        """The content of the file, also printed last."""
        fields = asdict(self) | {"aims": aims(self.rows), "seconds": round(self.seconds, 1)}
        del fields["folder"]
        return {"benchmark": "gpu", **fields}

    @property
    def is_good(self) -> bool:
        """Whether nothing failed and something was measured. Missed aims do not count."""
        statuses = {row["status"] for row in self.rows}
        has_failed = FAILED in statuses or bool(self.tests.get("failed"))
        return OK in statuses and not has_failed and not self.notes


def line_of(entry: dict[str, Any]) -> str:
    """A row as one line to read."""
    text = f"{entry['row']:<34}"
    if entry["status"] != OK:
        why = str(entry.get("error") or entry.get("why") or "").strip().splitlines()
        return f"{text} {entry['status']}{': ' + why[-1] if why else ''}"
    parts = [form.format(entry[name]) for name, form in SHOWN.items() if entry.get(name)]
    return " ".join([text, *parts])


def aims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each aim with its value in the better mode; passed is null if it was not measured."""
    alone = _best(rows, PLAIN, 1, "share_of_bound")
    plain = _best(rows, PLAIN, 1, "tokens_per_s")
    quantized = _best(rows, INT8, 1, "tokens_per_s")
    many = max(_best(rows, kind, MANY, "tokens_per_s") or 0.0 for kind in (PLAIN, INT8)) or None
    speedup = quantized / plain if plain and quantized else None
    without, chunk = (_best(rows, PLAIN, MANY, "tokens_per_s", load) for load in ("", CHUNK))
    kept = chunk / without if chunk and without else None
    return [
        _aim("share of the bound, one sequence, text, 16 bits", alone, BOUND_SHARE),
        _aim("int8 over 16 bits, one sequence, text", speedup, INT8_SPEEDUP),
        _aim(f"tokens/s, {MANY} sequences, text", many, TOKENS_PER_S),
        _aim(f"tokens/s with a chunk beside {MANY} sequences over without", kept, CHUNK_SHARE),
    ]


def _best(
    rows: list[dict[str, Any]], quantize: str, batch: int, name: str, load: str = ""
) -> float | None:
    wanted = {"kind": DECODE, "content": "text", "status": OK, "quantize": quantize, "batch": batch}
    alike = [row for row in rows if wanted.items() <= row.items()]
    found = [row[name] for row in alike if row.get("load", "") == load]
    return max(found, default=None)


def _aim(what: str, value: float | None, least: float) -> dict[str, Any]:
    passed = None if value is None else value >= least
    value = None if value is None else round(value, 4)
    return {"aim": what, "at_least": least, "value": value, "passed": passed}


def base_machine(root: Path) -> dict[str, Any]:
    """The facts about the machine that need no torch; the measuring processes add the rest."""
    query = "name,driver_version,clocks.max.sm,clocks.max.mem,memory.total"
    return {
        "commit": _commit(root),
        "command": " ".join(["python", *sys.argv]),
        "python": sys.version.split()[0],
        "cores": len(os.sched_getaffinity(0)),
        "nvidia_smi": _first_line(
            root, "nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"
        ),
    }


def _commit(root: Path) -> str:
    """The measured commit: from git, or from the variable COMMIT without git."""
    found = _first_line(root, "git", "rev-parse", "--short", "HEAD")
    if not found:
        return os.environ.get("COMMIT", "unknown")
    is_changed = _first_line(root, "git", "status", "--porcelain", "--untracked-files=no")
    return f"{found}, changed" if is_changed else found


def _first_line(folder: Path, *command: str) -> str:
    """The first line that a command prints; empty if the command fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else ""
