"""What the tools' checkpoints take in memory while they load and after, beside the arithmetic.

The bundled model is too small: what else a process does would hide it. Here each tool quantizes a
model of four wide layers, 260 MB in float32, all its forms in one process.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.loading_memory import loading_memory
from support.quantizers import FORMS, run_tool

from vlmserve.bench.checkpoints import build

pytestmark = pytest.mark.slow
# the largest weight in full precision, and its transposed copy
ONE_WEIGHT = 2 * 1024 * 4096 * 4


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return build("wide", tmp_path_factory.mktemp("wide"))


@pytest.mark.parametrize("tool", FORMS)
def test_a_tools_checkpoints_take_what_the_arithmetic_says(
    source, tool, tmp_path, record_property
) -> None:
    run_tool(tool, source, ",".join(FORMS[tool]), tmp_path, None)
    plain = (source / "model.safetensors").stat().st_size
    measured = loading_memory("float32", *(tmp_path / form for form in FORMS[tool]))
    shutil.rmtree(tmp_path)
    for (form, bits), found in zip(FORMS[tool].items(), measured, strict=True):
        record_property(f"{tool} {form}", f"{found}")
        assert found.resident == pytest.approx(found.counted, rel=0.1), form
        assert found.kept == pytest.approx(found.counted, rel=0.1), form
        assert found.peak < 1.1 * found.counted + ONE_WEIGHT, form
        # scales, zeros, and what is never coded: up to two thirds of the codes, by the processor
        assert found.counted < bits / 32 * 1.7 * plain, form
