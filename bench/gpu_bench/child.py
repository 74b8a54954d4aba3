"""Measures the rows of one kind of weights, in a process that may die without costing the others.

Owns the runner, and what happens when a row fails. Told by JSON on stdin, it tells its parent by a
line of JSON for each event in a file: machine, bandwidth, building, begin, row.
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
import transformers
from transformers import MllamaConfig

from vlmserve.models.create_runner import create_runner
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.settings.runner_config import RunnerConfig
from vlmserve.models.weights.random_weights import random_checkpoint

from ..checkpoints import layout
from .document import DROPPED, FAILED, NOT_AVAILABLE, OK
from .measure import MEASURES, copy_bandwidth
from .plan import GRAPHS, PLAIN, Row, Size, expected_s

# exit code: the device is lost to this process, the rows that are left need another
LOST = 3
# what the project's own kernels read, which alone have graphs
BLOCK_SIZE = 16
TRACE_LINES = 12


class RehearsedError(Exception):
    """A failure that was asked for by --rehearse."""


def published_config() -> MllamaConfig:
    """Llama-3.2-11B-Vision's sizes, as its config.json has them."""
    vision = {"image_size": 560, "max_num_tiles": 4, "patch_size": 14, "vision_output_dim": 7680}
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    text = {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
        "max_position_embeddings": 131_072,
        "rope_parameters": rope,
        "pad_token_id": 128_004,
    }
    return MllamaConfig(vision_config=vision, text_config=text, image_token_index=128_256)


class _Said(logging.Handler):
    """What the making of a runner told the log: its attention, its memory, its graphs."""

    _NO_GRAPHS = "decode graphs: none ("

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the line."""
        self.lines.append(record.getMessage())

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Listen until the block ends."""
        logger = logging.getLogger("vlmserve")
        level = logger.level
        logger.addHandler(self)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.removeHandler(self)
            logger.setLevel(level)

    @property
    def why_no_graphs(self) -> str:
        """Why decode steps are not recorded."""
        told = [line for line in self.lines if line.startswith(self._NO_GRAPHS)]
        return told[-1].removeprefix(self._NO_GRAPHS).removesuffix(")") if told else "not told"


class Child:
    """One process's work."""

    def __init__(self, told: dict[str, Any]) -> None:
        self._size = Size(**told["size"] | {"batches": tuple(told["size"]["batches"])})
        self._rows = [Row(**row) for row in told["rows"]]
        self._deadline: float = told["deadline"]
        self._rehearsed: dict[str, str] = told["rehearse"]
        self._events = Path(told["events"])
        self._bytes_per_s = 0.0
        self._runner: ModelRunner | None = None
        self._runner_of: tuple[str, str] | None = None
        self._said = _Said()
        self._taken_s: dict[str, float] = {}
        # what could not be built, and why: it is not tried again for every row
        self._unbuilt: dict[tuple[str, str], str] = {}

    def run(self) -> None:
        """All rows that there is time for."""
        self._tell("machine", **machine_of(self._size))
        bandwidth = copy_bandwidth(self._size)
        self._bytes_per_s = bandwidth["bytes_per_s"]
        self._tell("bandwidth", **bandwidth)
        for row in self._rows:
            self._run_row(row)

    def _run_row(self, row: Row) -> None:
        left = self._deadline - time.monotonic()
        if (expected := expected_s(row, self._taken_s)) > left:
            why = f"{left:.0f} s were left and it takes {expected:.0f}"
            self._tell("row", row=row.id, status=DROPPED, why=why)
            return
        wanted = (row.quantize, row.mode)
        if wanted in self._unbuilt:
            self._tell("row", row=row.id, status=FAILED, error=self._unbuilt[wanted])
            return
        try:
            runner = self._runner_for(wanted, row)
            if row.mode == GRAPHS and not runner.has_graphs:
                why = self._said.why_no_graphs
                self._tell("row", row=row.id, status=NOT_AVAILABLE, why=why)
                return
            began = time.monotonic()
            self._tell("begin", row=row.id)
            self._rehearse(row)
            figures = MEASURES[row.kind](runner, row, self._size, self._bytes_per_s)
        except Exception as error:  # whatever it is, the next row goes on
            told = told_error(error)
            self._tell("row", row=row.id, status=FAILED, error=told)
            if self._runner is None:
                self._unbuilt[wanted] = told
            self._runner = self._runner_of = None
            self._check_device()
            return
        seconds = time.monotonic() - began
        self._taken_s[row.kind] = max(seconds, self._taken_s.get(row.kind, 0.0))
        self._tell("row", row=row.id, status=OK, **figures, seconds=round(seconds, 2))

    def _rehearse(self, row: Row) -> None:
        match self._rehearsed.get(row.id):
            case "raise":
                raise RehearsedError("as --rehearse asked")
            case "die":
                os._exit(9)
            case "hang":
                time.sleep(3600)

    def _runner_for(self, wanted: tuple[str, str], row: Row) -> ModelRunner:
        """The runner of the wanted weights and mode; there is never a second one beside it.

        A runner that replays steps becomes an eager one without being built anew.
        """
        if self._runner is not None and self._runner_of is not None:
            if self._runner_of == (row.quantize, GRAPHS) and row.mode != GRAPHS:
                self._runner.forget_graphs()
                self._runner_of = wanted
            if self._runner_of == wanted:
                return self._runner
        self._runner = self._runner_of = None
        gc.collect()
        if self._size.device == "cuda":
            torch.cuda.empty_cache()
        self._tell("building", row=row.id)
        began = time.monotonic()
        said = _Said()
        with said.collecting():
            runner = make_runner(self._size, row)
        self._runner, self._runner_of, self._said = runner, wanted, said
        seconds = round(time.monotonic() - began, 2)
        self._tell("built", of=f"{row.quantize}/{row.mode}", seconds=seconds, said=said.lines)
        return runner

    def _check_device(self) -> None:
        """End where a failure has taken the device from this process: an illegal access does."""
        if self._size.device != "cuda":
            return
        try:
            torch.cuda.synchronize()
            torch.zeros(1, device="cuda").item()
        except Exception:
            sys.exit(LOST)

    def _tell(self, event: str, **facts: Any) -> None:
        with self._events.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **facts}) + "\n")


def make_runner(size: Size, row: Row) -> ModelRunner:
    """A runner whose pools hold every row's sequences."""
    config = published_config() if size.model == "11b" else layout(size.model)
    checkpoint = random_checkpoint(config, getattr(torch, size.dtype))
    vision = cast(Any, config.vision_config)
    most = max(size.batches)
    blocks = -(-size.length(most) // BLOCK_SIZE)
    return create_runner(
        checkpoint,
        RunnerConfig(
            device=size.device,
            quantize=None if row.quantize == PLAIN else row.quantize,
            max_model_len=size.max_model_len,
            max_num_seqs=most,
            max_num_batched_tokens=max(size.prefill_tokens, most),
            block_size=BLOCK_SIZE,
            num_text_blocks=max((most + 1) * blocks, -(-size.max_model_len // BLOCK_SIZE)),
            num_image_blocks=(most + 1) * vision.max_num_tiles,
            cuda_graphs=row.mode == GRAPHS,
        ),
    )


def machine_of(size: Size) -> dict[str, Any]:
    """Versions and the device, as torch sees them."""
    facts: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": _version("triton"),
        "accelerate": _version("accelerate"),
        "numpy": _version("numpy"),
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


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def told_error(error: BaseException) -> str:
    """The end of a traceback: where it came from, and what it says."""
    lines = "".join(traceback.format_exception(error)).strip().splitlines()
    return "\n".join(lines[-TRACE_LINES:])[-3000:]


def main() -> None:
    Child(json.load(sys.stdin)).run()


if __name__ == "__main__":
    main()
