"""The kernels of several adapters against torch, in Triton's interpreter, or on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.attention_cases import needs_interpreter

from vlmserve.models.kernels.self_test import TOLERANCE, _largest_error
from vlmserve.models.lora.kernel_rows import (
    KernelRows,
    trial_pairs,
    trial_site,
)
from vlmserve.models.lora.rows import NO_SLOT, AdapterRows, sorted_rows

HAS_CUDA = torch.cuda.is_available()
DEVICES = [
    pytest.param("cpu", id="interpreter", marks=[needs_interpreter()]),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="there is no CUDA device")],
    ),
]
SLOTS = {
    "one row": [2],
    "one row without": [NO_SLOT, 3],
    "an empty slot": [1, 1, 0],
    "two tiles of one slot": [0] * 19 + [NO_SLOT] + [2] * 17,
    "in any order": [0, 2, NO_SLOT, 3, 2, 0, 0, 1, NO_SLOT, 2],
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SLOTS)
def test_rows_of_several_adapters_are_changed_as_by_torch(name: str, device: str) -> None:
    """float32: within 1e-4; rows without an adapter and of an empty slot keep their bits."""
    place, slots = torch.device(device), np.array(SLOTS[name])
    site = trial_site(torch.float32, place, num_in=200, num_outs=(70, 30, 10), max_rank=18)
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(len(slots), 200, generator=generator).to(place)
    before = torch.randn(len(slots), 110, generator=generator).to(place)
    actual, expected = before.clone(), before.clone()
    KernelRows(slots, 4, place).change(actual, states, site)
    AdapterRows(slots, place).change(expected, states, site)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    kept = torch.from_numpy((slots == NO_SLOT) | (slots == 1)).to(place)
    assert torch.equal(actual[kept], before[kept])
    if (slots == 2).any():
        assert not torch.equal(actual[~kept], before[~kept])


@pytest.mark.parametrize("device", DEVICES)
def test_split_inputs_and_bfloat16_are_right_to_the_trials_tolerance(device: str) -> None:
    """2,200 inputs are four splits, the last shorter; states are not contiguous."""
    for actual, expected in trial_pairs(torch.device(device), torch.bfloat16):
        assert _largest_error(actual, expected) <= TOLERANCE
    place, slots = torch.device(device), np.array([2, 0, NO_SLOT])
    site = trial_site(torch.float32, place, num_in=2200, num_outs=(50,), max_rank=5)
    states = torch.randn(3, 4400, generator=torch.Generator().manual_seed(1)).to(place)[:, ::2]
    actual, expected = torch.zeros(3, 50, device=place), torch.zeros(3, 50, device=place)
    KernelRows(slots, 4, place).change(actual, states, site)
    AdapterRows(slots, place).change(expected, states, site)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_rows_are_sorted_by_slot_and_keep_their_order() -> None:
    order, starts = sorted_rows(np.array([2, NO_SLOT, 0, 2, 1, 0]), 4)
    assert order.tolist() == [2, 5, 4, 0, 3]
    assert starts.tolist() == [0, 2, 3, 5, 5]


def test_a_site_that_no_adapter_of_the_rows_changes_is_left_out() -> None:
    site = trial_site(torch.float32, torch.device("cpu"), 32, (8,), 2)
    assert not KernelRows(np.array([1, NO_SLOT]), 4, torch.device("cpu")).changes(site)
    assert KernelRows(np.array([1, 2]), 4, torch.device("cpu")).changes(site)
