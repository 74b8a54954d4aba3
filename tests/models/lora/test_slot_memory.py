"""The device memory of adapters' slots: estimated before loading, allocated, and logged."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from support.oracle import BLOCK_SIZE, checkpoint, loaded
from support.thread_ranks import on_ranks

from vlmserve.models.create_runner import create_runner
from vlmserve.models.errors import ModelError
from vlmserve.models.lora.limits import AdapterLimits, limits_of, slot_bytes
from vlmserve.models.lora.store import AdapterStore
from vlmserve.models.memory.available import AvailableMemory
from vlmserve.models.settings.runner_config import RunnerConfig
from vlmserve.models.tensor_parallel.plan import cut_linears
from vlmserve.models.weights.loader import load_model, open_checkpoint
from vlmserve.models.weights.tensor_loader import WHOLE, RankShare

LAYOUT = "tiny"
LIMITS = AdapterLimits(3, 16, torch.bfloat16)
OPTIONS = {"dtype": "float32", "device": "cpu", "block_size": BLOCK_SIZE, "max_model_len": 256}
MANY = {"max_num_seqs": 1000, "num_image_blocks": 8}  # so that memory alone bounds the text pool


def test_the_estimate_is_what_the_slots_take():
    opened = open_checkpoint(checkpoint(LAYOUT), torch.float32)
    estimate = sum(slot_bytes(opened.meta_model, WHOLE, LIMITS).values())
    assert AdapterStore(loaded(LAYOUT), LIMITS).num_bytes == estimate


def test_a_ranks_slots_have_its_shares_alone():
    opened = open_checkpoint(checkpoint(LAYOUT), torch.float32)
    share = RankShare(0, 2, cut_linears(opened.meta_model, 2))
    estimate = sum(slot_bytes(opened.meta_model, share, LIMITS).values())
    assert estimate < sum(slot_bytes(opened.meta_model, WHOLE, LIMITS).values())

    def allocated(group):
        if group.rank == 0:
            return AdapterStore(
                load_model(checkpoint(LAYOUT), "cpu", "float32", None, group), LIMITS
            ).num_bytes
        return estimate

    assert set(on_ranks(2, allocated)) == {estimate}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"max_loras": 2}, AdapterLimits(2, 64, torch.bfloat16)),
        (
            {"max_loras": 2, "max_lora_rank": 8, "lora_dtype": "float32"},
            AdapterLimits(2, 8, torch.float32),
        ),
    ],
)
def test_limits_come_from_the_settings(options, expected, monkeypatch):
    monkeypatch.setattr("vlmserve.models.lora.limits.cpu_has_bfloat16", lambda: True)
    assert limits_of(RunnerConfig(**options), torch.bfloat16) == expected


@pytest.mark.parametrize(
    ("device", "has_it", "dtype", "expected"),
    [
        ("cpu", True, "bfloat16", "bfloat16"),
        ("cpu", False, "bfloat16", "float32"),
        ("cpu", True, "float16", "float32"),
        ("cuda", False, "bfloat16", "bfloat16"),
    ],
)
def test_adapters_are_float32_on_a_cpu_that_lacks_the_compute_type(
    device, has_it, dtype, expected, monkeypatch
):
    monkeypatch.setattr("vlmserve.models.lora.limits.cpu_has_bfloat16", lambda: has_it)
    monkeypatch.setattr(
        "vlmserve.models.lora.limits.choose_device", lambda name: torch.device(name)
    )
    chosen = limits_of(RunnerConfig(max_loras=1, device=device), getattr(torch, dtype))
    assert chosen == AdapterLimits(1, 64, getattr(torch, expected))
    given = limits_of(RunnerConfig(max_loras=1, device=device, lora_dtype=dtype), torch.float32)
    assert given == AdapterLimits(1, 64, getattr(torch, dtype))


def test_slots_are_subtracted_from_the_pools_and_logged(caplog):
    def available(num_bytes, device):
        return AvailableMemory(num_bytes, "of the test")

    config = RunnerConfig(**OPTIONS, **MANY)
    memory = partial(available, 200_000_000)
    plain = create_runner(checkpoint(LAYOUT), config, available=memory)
    with caplog.at_level(logging.INFO):
        config = RunnerConfig(**OPTIONS, **MANY, max_loras=4, max_lora_rank=16)
        adapted = create_runner(checkpoint(LAYOUT), config, available=memory)
    assert plain.adapters is None
    assert adapted.info.pools.num_text_blocks < plain.info.pools.num_text_blocks
    assert "4 adapters to rank 16 " in caplog.text
    config = RunnerConfig(**OPTIONS, **MANY, max_loras=64, max_lora_rank=512)
    with pytest.raises(ModelError, match=r"slots of adapters .*--max-lora-rank"):
        create_runner(checkpoint(LAYOUT), config, available=memory)
