"""Measures the host between the launches of two steps' passes.

    OMP_NUM_THREADS=1 python bench/between_passes.py

A pass is launched before the tokens that it reads are on the host, so a GPU waits only if the
host's work of a whole step (`host_ms`) takes longer than a pass. Here a CPU runs the true runner
and scheduler, and samples in that time; only the recorded passes compute nothing. The last line is
one JSON document.
"""

from __future__ import annotations

import statistics
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from engine_requests import Loop, open_runner
from processes import BUNDLED, arguments, numbers, print_document
from vlmserve.models.attention.triton_paged import TritonBackend
from vlmserve.models.device_copies import Download
from vlmserve.models.execution.graphs.recorder import Computation, Recorder
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.router.scheduler.interface import SchedulerLimits

NUM_PROMPT_TOKENS = 32


class _NoKernels:
    """Launches nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


class _Empty(Recorder):
    """Replays that compute nothing, and the time of the last one."""

    def __init__(self) -> None:
        self.replayed_at = 0.0

    def record(self, compute: Computation) -> Computation:
        output = torch.zeros_like(compute())

        def replay() -> torch.Tensor:
            self.replayed_at = time.thread_time()
            return output

        return replay


def with_empty_passes(runner: ModelRunner, num_rows: int) -> _Empty:
    """Let the runner replay passes that compute nothing."""
    backend, recorder = TritonBackend(), _Empty()
    names = ("attend_kernel", "merge_kernel", "write_kernel")
    backend._kernels = SimpleNamespace(**{one: _NoKernels() for one in names})  # type: ignore[assignment]
    eager, runner._backend = runner._backend, backend
    runner.record_graphs(num_rows, recorder)
    runner._backend = eager  # prompts are computed
    return recorder


def measure(checkpoint: str, num_rows: int, num_steps: int) -> dict[str, float]:
    """Medians in milliseconds, of steps of that many greedy rows of text."""
    length = NUM_PROMPT_TOKENS + num_steps + 2 * num_rows + 32
    settings: dict[str, Any] = {"max_model_len": length, "max_num_seqs": num_rows}
    runner = open_runner(checkpoint, device="cpu", dtype="float32", **settings)
    recorder = with_empty_passes(runner, num_rows)
    limits = SchedulerLimits(
        max_num_seqs=num_rows,
        max_num_batched_tokens=NUM_PROMPT_TOKENS * num_rows,
        max_num_batched_images=1,
        max_model_len=length,
    )
    loop = Loop(runner, limits, np.random.default_rng(0))
    for number in range(num_rows):
        loop.add(str(number), NUM_PROMPT_TOKENS, num_steps + 2 * num_rows + 16)
    arrived_at, wait = [0.0], Download.wait

    def timed(download: Download) -> Any:
        result = wait(download)
        arrived_at[0] = time.thread_time()
        return result

    Download.wait = timed  # type: ignore[method-assign]
    try:
        return _medians(loop, recorder, arrived_at, num_steps)
    finally:
        Download.wait = wait  # type: ignore[method-assign]


def _medians(
    loop: Loop, recorder: _Empty, arrived_at: list[float], num_steps: int
) -> dict[str, float]:
    host = []
    for _ in range(num_steps + 8):
        last_launch = recorder.replayed_at
        result = loop.execute(loop.plan())
        host.append(recorder.replayed_at - last_launch)
        loop.scheduler.update(result)
        loop.scheduler.counts()
    assert loop.runner.next_pass.num_used >= num_steps, "passes were not started before their steps"
    assert recorder.replayed_at < arrived_at[0], "a pass was launched behind its tokens"
    return {"host_ms": round(1e3 * statistics.median(host[8:]), 4)}


def main() -> None:
    args = arguments(__doc__, checkpoint=BUNDLED, rows="1,8,64", steps=300)
    found = {}
    for num_rows in numbers(args.rows):
        found[num_rows] = measure(args.checkpoint, num_rows, args.steps)
        print(f"{num_rows:>3} rows: {found[num_rows]}")
    print_document(args, medians=found)


if __name__ == "__main__":
    main()
