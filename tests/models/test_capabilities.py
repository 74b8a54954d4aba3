"""What each generation of GPUs gets, and how the log says so; the GPUs are stand-ins.

One table of dtype, attention, fused operations, keys that a program loads, and recorded steps.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from triton.runtime.errors import PTXASError

from vlmserve.models import create_runner
from vlmserve.models.attention import Geometry, choice, triton_paged
from vlmserve.models.attention.choice import choose_backend
from vlmserve.models.attention.triton_paged import MIN_DOT, TritonBackend, keys_at_once
from vlmserve.models.errors import ModelError
from vlmserve.models.execution.graphs.eligibility import why_not_with
from vlmserve.models.kernels.self_test import are_usable
from vlmserve.models.settings.runner_config import RunnerConfig
from vlmserve.models.weights.device_choice import choose_dtype

GPU = torch.device("cuda", 0)
TOO_OLD = "compute capability 7.5 is below 8.0"


@dataclass(frozen=True)
class Gets:
    """What a card gets. keys: of one query that a program multiplies at a time."""

    dtype: torch.dtype
    backend: str
    keys: int
    has_kernels: bool = True


CARDS = {
    (7, 5): Gets(torch.float16, "sdpa", 64, has_kernels=False),
    (8, 0): Gets(torch.bfloat16, "triton", 64),
    (8, 6): Gets(torch.bfloat16, "triton", 32),
    (8, 9): Gets(torch.bfloat16, "triton", 32),
    (9, 0): Gets(torch.bfloat16, "triton", 64),
    (10, 0): Gets(torch.bfloat16, "triton", 64),
}


@pytest.fixture(params=CARDS, ids=lambda one: "{}.{}".format(*one))
def card(request: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> tuple[int, int]:
    """A GPU of that capability, without flash-attn, whose kernels pass their trials."""
    caplog.set_level(logging.INFO)
    capability: tuple[int, int] = request.param
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(triton_paged, "capability_of", lambda device: capability)
    monkeypatch.setitem(__import__("sys").modules, "flash_attn", None)
    monkeypatch.setattr(choice, "what_is_wrong", lambda *args: None)
    return capability


def geometry(dtype: torch.dtype) -> Geometry:
    """Of the 11B model on the GPU."""
    return Geometry(GPU, dtype, 32, 8, 128, 1601)


def test_each_generation_gets_its_dtype_attention_and_kernels(card, caplog) -> None:
    gets = CARDS[card]
    assert choose_dtype("auto", GPU) is gets.dtype
    chosen = choose_backend("auto", geometry(gets.dtype), with_graphs=True)
    assert (chosen.backend.name, chosen.block_size) == (gets.backend, 16)
    assert keys_at_once(GPU, MIN_DOT) == gets.keys
    assert are_usable("norms", GPU, lambda: []) is gets.has_kernels
    if gets.has_kernels:
        assert caplog.messages == ["attention by triton, blocks of 16 tokens"]
        assert why_not_with(chosen.backend) is None
    else:
        attention, norms = caplog.messages
        assert attention == (
            f"attention by sdpa, blocks of 16 tokens (not triton: {TOO_OLD}; not flash_attn: "
            f"{TOO_OLD}; not varlen: {TOO_OLD}; not cpu: it needs a CPU, and this is cuda)"
        )
        assert norms == f"norms use torch's operations: {TOO_OLD}"
        assert "the attention backend is sdpa" in str(why_not_with(chosen.backend))


def test_float32_gets_sdpa_on_each_generation(card, caplog) -> None:
    chosen = choose_backend("auto", geometry(torch.float32), with_graphs=True)
    assert chosen.backend.name == "sdpa"
    assert "not triton: float32 heads of 128 are over 64" in caplog.text


def test_a_kernel_that_the_chip_refuses_falls_back_with_its_reason(
    card, caplog, monkeypatch
) -> None:
    """triton's errors are no RuntimeError: they ended the start."""
    refused = "the trial failed: PTXASError: refused"

    def wrong(backend: Any, *args: Any) -> str | None:
        return refused if isinstance(backend, TritonBackend) else None

    def trial() -> Any:
        raise PTXASError("refused")

    monkeypatch.setattr(choice, "what_is_wrong", wrong)
    gets = CARDS[card]
    chosen = choose_backend("auto", geometry(gets.dtype), with_graphs=True)
    assert chosen.backend.name != "triton"
    assert not are_usable("norms", GPU, trial)
    reason = refused if gets.has_kernels else TOO_OLD
    assert f"not triton: {reason}" in caplog.messages[0]
    assert caplog.messages[1].startswith("norms use torch's operations: ")
    assert ("PTXASError" in caplog.messages[1]) is gets.has_kernels


def test_float32_on_a_gpu_uses_no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The patch embedding is a convolution, for which torch allows TF32 by default."""
    monkeypatch.setattr(create_runner, "choose_device", lambda name: GPU)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with pytest.raises(ModelError):
        create_runner.create_runner("no folder", RunnerConfig(dtype="float32"))
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
