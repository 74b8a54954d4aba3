"""Progress of loading by bytes: a bar on a terminal, a few lines elsewhere."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from support.oracle import checkpoint

from vlmserve.models.weights import progress
from vlmserve.models.weights.loader import load_model
from vlmserve.models.weights.progress import ByteProgress

GIB = 1 << 30


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end() -> None:
    stream, clock = io.StringIO(), Clock()
    bar = ByteProgress(10 * GIB, stream, clock)
    for _ in range(10):
        clock.now += 4.0
        bar.advance(GIB)
    bar.close()
    assert stream.getvalue().splitlines() == [
        "loading weights: 3.0 GiB of 10.0 GiB (30 %)",
        "loading weights: 6.0 GiB of 10.0 GiB (60 %)",
        "loading weights: 9.0 GiB of 10.0 GiB (90 %)",
        "loading weights: 10.0 GiB read in 40.0 s",
    ]


def test_a_terminal_gets_a_bar_that_counts_bytes() -> None:
    stream = Terminal()
    bar = ByteProgress(4 * GIB, stream)
    bar.advance(GIB)
    bar.advance(3 * GIB)
    bar.close()
    assert re.search(r"loading weights .*4\.0/4\.0 GiB", stream.getvalue())
    assert "read in" not in stream.getvalue()


@pytest.mark.parametrize("quantize", [None, "bitsandbytes", "bitsandbytes-nf4"])
def test_every_byte_of_the_checkpoint_is_counted_while_it_loads(
    quantize: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []

    class Counting(ByteProgress):
        def advance(self, num_bytes: int) -> None:
            steps.append(num_bytes)
            super().advance(num_bytes)

    stream = io.StringIO()
    shown = progress.shown
    monkeypatch.setattr(
        progress, "shown", lambda sizes: shown(sizes, lambda total: Counting(total, stream))
    )
    load_model(checkpoint("tiny"), "cpu", "float32", quantize)
    header = int.from_bytes(
        (Path(checkpoint("tiny")) / "model.safetensors").read_bytes()[:8], "little"
    )
    size = (Path(checkpoint("tiny")) / "model.safetensors").stat().st_size
    assert sum(steps) == size - 8 - header
    assert len(steps) > 50
    assert "1.3 MiB read in" in stream.getvalue()


def test_transformers_bar_is_its_own_again_afterwards() -> None:
    from transformers.utils import logging

    def hook(factory, args, kwargs):  # type: ignore[no-untyped-def]
        return factory(*args, **kwargs)

    previous = logging.set_tqdm_hook(hook)
    try:
        with progress.shown({}, lambda total: ByteProgress(total, io.StringIO())):
            pass
        assert logging.set_tqdm_hook(previous) is hook
    finally:
        logging.set_tqdm_hook(previous)
