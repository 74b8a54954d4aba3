"""What a quantized checkpoint takes while it loads and after, measured in a process of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.coded_checkpoints import FORMS, write
from support.loading_memory import loading_memory

from vlmserve.bench.checkpoints import build

pytestmark = pytest.mark.slow
# for one layer's weights in full precision, and their joined copies
ONE_LAYER = 32 << 20


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
    (found,) = loading_memory("float32", coded)
    assert found.kept == pytest.approx(found.counted, rel=0.1)
    assert found.resident == pytest.approx(found.counted, rel=0.1)
    assert found.peak < 1.1 * found.counted + ONE_LAYER
    assert found.peak < 0.5 * (plain / "model.safetensors").stat().st_size
