"""Measures what a checkpoint takes in memory while it loads and after, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 600

LOAD = """
import ctypes, gc, json, sys, threading
import torch
import vlmserve.models.execution.runner
from vlmserve.models.bundled import CHECKPOINT
from vlmserve.models.decoder.int8.dynamic import DynamicInt8Weight
from vlmserve.models.decoder.packed_linear import PackedWeight
from vlmserve.models.kernels.row_products import RowWeight
from vlmserve.models.memory.estimate import part_bytes
from vlmserve.models.weights.device_map import parts_of
from vlmserve.models.weights.loader import load_model, open_checkpoint

PACKED = (PackedWeight, RowWeight, DynamicInt8Weight)

def anonymous_bytes():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def mapped_bytes(folder, tensors):
    # those that lie in the files as they are
    lines = [line.split()[0] for line in open("/proc/self/maps") if folder in line]
    ranges = [[int(end, 16) for end in line.split("-")] for line in lines]
    return sum(
        one.nbytes for one in tensors if any(a <= one.data_ptr() < b for a, b in ranges)
    )

def packed_bytes(model):
    # opaque tensors without an address, so no parameters
    values = [value for module in model.modules() for value in vars(module).values()]
    return sum(one.nbytes for one in values if isinstance(one, PACKED))

def released():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)

def measure(folder, dtype):
    global peak
    opened = open_checkpoint(folder, getattr(torch, dtype))
    sizes = part_bytes(parts_of(opened.meta_model), opened.tensors, getattr(torch, dtype))
    del opened
    released()
    before = peak = anonymous_bytes()
    is_over = threading.Event()

    def watch():
        global peak
        while not is_over.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_model(folder, "cpu", dtype).model
    is_over.set()
    watcher.join()
    tensors = [one.detach() for one in [*model.parameters(), *model.buffers()]]
    released()
    return {
        "counted": sum(sizes.values()),
        "peak": peak - before,
        "kept": sum(one.nbytes for one in tensors) + packed_bytes(model),
        "resident": anonymous_bytes() - before + mapped_bytes(folder, tensors),
    }

dtype, *folders = sys.argv[1:]
# what is imported, compiled, tried and kept only once: of the bundled model, and of large layers
load_model(CHECKPOINT, "cpu", dtype, quantize="int8")
load_model(folders[0], "cpu", dtype)
for folder in folders:
    print(json.dumps(measure(folder, dtype)))
"""


@dataclass(frozen=True)
class LoadingMemory:
    """Bytes. counted: by the arithmetic; peak: anonymous memory while loading, over that before.

    kept: of the model's tensors. resident: anonymous memory after, and tensors in mapped files.
    Other mapped pages are the system's to drop, and not counted.
    """

    counted: int
    peak: int
    kept: int
    resident: int


def loading_memory(dtype: str, *folders: Path) -> list[LoadingMemory]:
    """What it takes to load each checkpoint on a CPU, one after the other in one process."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, dtype, *map(str, folders)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[-len(folders) :]
    return [LoadingMemory(**json.loads(line)) for line in lines]
