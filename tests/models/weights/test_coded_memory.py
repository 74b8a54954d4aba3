"""What a quantized checkpoint takes while it loads and after, measured in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.coded_checkpoints import FORMS, write

from vlmserve.bench.checkpoints import build

pytestmark = pytest.mark.slow
# for one layer's weights in full precision, and their joined copies
ONE_LAYER = 32 << 20

LOAD = """
import json, sys, threading
import torch
import vlmserve.models.execution.runner
from vlmserve.models.memory.estimate import part_bytes
from vlmserve.models.weights.device_map import parts_of
from vlmserve.models.weights.loader import load_model, open_checkpoint

def anonymous_bytes():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

folder, dtype = sys.argv[1], getattr(torch, sys.argv[2])
opened = open_checkpoint(folder, dtype)
counted = sum(part_bytes(parts_of(opened.meta_model), opened.tensors, dtype).values())
before, peak, is_over = anonymous_bytes(), 0, threading.Event()

def watch():
    global peak
    while not is_over.wait(0.002):
        peak = max(peak, anonymous_bytes())

watcher = threading.Thread(target=watch)
watcher.start()
model = load_model(folder, "cpu", sys.argv[2]).model
is_over.set()
watcher.join()
kept = sum(one.nbytes for one in [*model.parameters(), *model.buffers()])
print(json.dumps({"counted": counted, "peak": peak - before, "kept": kept}))
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return build("m100", tmp_path_factory.mktemp("m100"), with_processor=False)


@pytest.mark.parametrize("name", ["fp8-channel", "w4a16-zeros", "gptq-act-order", "nf4-nested"])
def test_loading_takes_what_the_arithmetic_says_and_never_the_16_bit_size(
    plain, name, tmp_path
) -> None:
    """m100 is 385 MB in float32 and 193 MB in 16 bits. Codes that a CPU uses as they lie in the
    file are mapped, so the peak may be below the sum."""
    coded, dequantized = write(plain, FORMS[name], tmp_path)
    shutil.rmtree(dequantized)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(coded), "float32"],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kept"] == pytest.approx(found["counted"], rel=0.1)
    assert found["peak"] < 1.1 * found["counted"] + ONE_LAYER
    assert found["peak"] < 0.5 * (plain / "model.safetensors").stat().st_size
