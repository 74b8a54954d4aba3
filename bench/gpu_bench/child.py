"""Measures the rows of one kind of weights, in a process that may die without costing the others.

Owns the runner, and what happens when a row fails. Reads its work as JSON from stdin and reports
each event as a line of JSON in a file: machine, bandwidth, building, built, begin, row.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import platform
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch

from vlmserve.models.create_runner import create_runner
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.settings.runner_config import RunnerConfig
from vlmserve.models.weights.random_weights import random_checkpoint

from ..bounds import Machine
from ..checkpoints import layout
from ..step_model import estimate_ms
from .document import DROPPED, FAILED, NOT_AVAILABLE, OK
from .measure import MEASURES, copy_bandwidth
from .plan import GRAPHS, PLAIN, Row, Size, expected_s

# exit code: this process has lost the device; the remaining rows need a new process
LOST = 3
# the block size of the project's kernels, the only attention with graphs
BLOCK_SIZE = 16
TRACE_LINES = 12
NO_GRAPHS = "decode graphs: none ("


class RehearsedError(Exception):
    """A failure that --rehearse requested."""


@contextmanager
def collected_log() -> Iterator[list[str]]:
    """The lines that the block logs at INFO: attention, memory, graphs."""
    lines: list[str] = []
    logger, handler = logging.getLogger("vlmserve"), logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class Child:
    """The work of one process."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._size = Size(**order["size"] | {"batches": tuple(order["size"]["batches"])})
        self._rows = [Row(**row) for row in order["rows"]]
        self._deadline: float = order["deadline"]
        self._rehearsed: dict[str, str] = order["rehearse"]
        self._events = Path(order["events"])
        self._machine = Machine(1.0, 1.0)
        self._runner: ModelRunner | None = None
        self._runner_of: tuple[str, str] | None = None
        self._log: list[str] = []
        self._taken_s: dict[str, float] = {}
        # what could not be built, and why: no other row tries it again
        self._unbuilt: dict[tuple[str, str], str] = {}

    def run(self) -> None:
        """Measure all rows that there is time for."""
        self._report("machine", **machine_of(self._size))
        bandwidth = copy_bandwidth(self._size)
        self._machine = Machine(bandwidth["flops_per_s"], bandwidth["bytes_per_s"])
        self._report("bandwidth", **bandwidth)
        for row in self._rows:
            self._report("row", row=row.id, **self._entry(row))

    def _entry(self, row: Row) -> dict[str, Any]:
        """The row's status and figures."""
        left, wanted = self._deadline - time.monotonic(), (row.quantize, row.mode)
        if (expected := expected_s(row, self._taken_s)) > left:
            why = f"{left:.0f} s were left and it takes {expected:.0f}"
            return {"status": DROPPED, "why": why}
        if wanted in self._unbuilt:
            return {"status": FAILED, "error": self._unbuilt[wanted]}
        try:
            runner = self._runner_for(wanted, row)
            if row.mode == GRAPHS and not runner.has_graphs:
                return {"status": NOT_AVAILABLE, "why": self._why_no_graphs()}
            started = time.monotonic()
            self._report("begin", row=row.id)
            self._rehearse(row)
            figures = MEASURES[row.kind](runner, row, self._size, self._machine)
        except Exception as error:  # the next rows go on, whatever it is
            return {"status": FAILED, "error": self._drop_runner(wanted, error)}
        seconds = time.monotonic() - started
        self._taken_s[row.kind] = max(seconds, self._taken_s.get(row.kind, 0.0))
        estimate = estimate_ms(_device_name(self._size), row.quantize, row.estimated)
        return {"status": OK, **figures, "estimate_ms": estimate, "seconds": round(seconds, 2)}

    def _drop_runner(self, wanted: tuple[str, str], error: BaseException) -> str:
        """Forget the runner after a failure; returns the end of the traceback."""
        lines = "".join(traceback.format_exception(error)).strip().splitlines()
        text = "\n".join(lines[-TRACE_LINES:])[-3000:]
        if self._runner is None:
            self._unbuilt[wanted] = text
        self._runner = self._runner_of = None
        if self._size.device == "cuda":
            try:  # an illegal access takes the device from this process
                torch.cuda.synchronize()
                torch.zeros(1, device="cuda").item()
            except Exception:
                sys.exit(LOST)
        return text

    def _rehearse(self, row: Row) -> None:
        match self._rehearsed.get(row.id):
            case "raise":
                raise RehearsedError("as --rehearse asked")
            case "die":
                os._exit(9)
            case "hang":
                time.sleep(3600)

    def _runner_for(self, wanted: tuple[str, str], row: Row) -> ModelRunner:
        """The runner of the wanted weights and mode; the only runner at any time.

        A runner that replays steps becomes eager without a new build.
        """
        if self._runner is not None:
            if self._runner_of == (row.quantize, GRAPHS) and row.mode != GRAPHS:
                self._runner.forget_graphs()
                self._runner_of = wanted
            if self._runner_of == wanted:
                return self._runner
        self._runner = self._runner_of = None
        gc.collect()
        if self._size.device == "cuda":
            torch.cuda.empty_cache()
        self._report("building", row=row.id)
        started = time.monotonic()
        with collected_log() as lines:
            runner = make_runner(self._size, row)
        self._runner, self._runner_of, self._log = runner, wanted, lines
        seconds = round(time.monotonic() - started, 2)
        self._report("built", of=f"{row.quantize}/{row.mode}", seconds=seconds, said=lines)
        return runner

    def _why_no_graphs(self) -> str:
        found = [line for line in self._log if line.startswith(NO_GRAPHS)]
        return found[-1].removeprefix(NO_GRAPHS).removesuffix(")") if found else "not logged"

    def _report(self, event: str, **facts: Any) -> None:
        with self._events.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **facts}) + "\n")


def make_runner(size: Size, row: Row) -> ModelRunner:
    """A runner whose pools have room for every row's sequences."""
    config = layout(size.model)
    vision = cast(Any, config.vision_config)
    most = max(size.batches)
    blocks = -(-size.length(most) // BLOCK_SIZE)
    settings = RunnerConfig(
        device=size.device,
        quantize=None if row.quantize == PLAIN else row.quantize,
        max_model_len=size.max_model_len,
        max_num_seqs=most,
        max_num_batched_tokens=max(size.prefill_tokens, most),
        block_size=BLOCK_SIZE,
        num_text_blocks=(most + 1) * blocks + -(-size.max_model_len // BLOCK_SIZE),
        num_image_blocks=(most + 1) * vision.max_num_tiles,
        cuda_graphs=row.mode == GRAPHS,
    )
    return create_runner(random_checkpoint(config, getattr(torch, size.dtype)), settings)


def machine_of(size: Size) -> dict[str, Any]:
    """Versions and the device, as torch sees them."""
    packages = ("torch", "transformers", "triton", "accelerate", "numpy")
    facts: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        **{name: _version(name) for name in packages},
        "compiler": shutil.which("gcc") or shutil.which("cc") or "none: triton needs one",
    }
    if size.device != "cuda":
        return facts
    properties = torch.cuda.get_device_properties(0)
    return facts | {
        "device": properties.name,
        "cuda": torch.version.cuda,
        "capability": list(torch.cuda.get_device_capability(0)),
        "processors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
    }


def _device_name(size: Size) -> str:
    return torch.cuda.get_device_name(0) if size.device == "cuda" else ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


if __name__ == "__main__":
    Child(json.load(sys.stdin)).run()
