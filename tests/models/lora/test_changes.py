"""The change of a product by torch, for each layout of rows, against each row alone in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from vlmserve.models.lora import rows as lora_rows
from vlmserve.models.lora.reader import SiteWeights
from vlmserve.models.lora.rows import NO_SLOT, AdapterRows
from vlmserve.models.lora.slots import SiteSlots

NUM_IN, NUM_OUTS, NUM_SLOTS = 24, (12, 8, 6), 5
EQUAL = [(3, 3, 3)] * NUM_SLOTS
DIFFERENT = [(3, 0, 2), (4, 4, 4), (0, 0, 0), (1, 0, 0), (0, 4, 0)]
# of each row; one adapter, two in turns, four in order and not, with rows of none, few of many
LAYOUTS = {
    "one": [1] * 6,
    "one and none": [NO_SLOT, 1, 1, NO_SLOT],
    "two in turns": [0, 3, 0, 3, NO_SLOT],
    "four in order": [0, 0, 1, 1, 2, 2, 3, 3],
    "four from the second slot": [1, 2, 3, 4],
    "four in turns": [0, 1, 2, 3] * 2,
    "four with padding": [3, 0, 1, 2, 3, 2, 4, 4],
    "four and none": [0, NO_SLOT, 1, 2, 3, NO_SLOT, 3, 2],
    "uneven": [0] * 9 + [1, 2, 3],
}
IN_PLACE = {"four in order", "four from the second slot"}
SEPARATE = {"one", "one and none", "two in turns", "uneven"}


def site_of(ranks: list[tuple[int, ...]]) -> SiteSlots:
    generator = torch.Generator().manual_seed(0)
    site = SiteSlots.empty(NUM_SLOTS, 4, NUM_IN, NUM_OUTS, torch.float32, torch.device("cpu"))
    for slot, of_layers in enumerate(ranks):
        blocks, row, column = [], 0, 0
        for rank, width in zip(of_layers, NUM_OUTS, strict=True):
            if rank:
                blocks.append((row, column, torch.randn(rank, width, generator=generator)))
            row, column = row + rank, column + width
        a = torch.randn(row, NUM_IN, generator=generator)
        site.write(slot, SiteWeights(a, blocks) if blocks else None)
    return site


def alone(states: Tensor, site: SiteSlots, slots: list[int]) -> Tensor:
    """Each row's change, by its slot's whole matrices."""
    changes = torch.zeros(len(slots), sum(NUM_OUTS), dtype=torch.float64)
    for row, slot in enumerate(slots):
        if slot != NO_SLOT:
            changes[row] = states[row].double() @ site.a[slot].double().T @ site.b[slot].double()
    return changes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["same", "rounded"])
@pytest.mark.parametrize("ranks", [EQUAL, DIFFERENT], ids=["equal", "different"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_row_is_changed_by_its_own_adapter(layout, ranks, dtype):
    """dtype: of the product; the slots are float32."""
    slots, site = LAYOUTS[layout], site_of(ranks)
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(len(slots), NUM_IN, generator=generator).to(dtype)
    before = torch.randn(len(slots), sum(NUM_OUTS), generator=generator).to(dtype)
    result, rows = before.clone(), AdapterRows(np.array(slots), torch.device("cpu"))
    rows.change(result, states, site)
    expected = before.double() + alone(states, site, slots)
    tolerance = (
        {"atol": 1e-4, "rtol": 0.0} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    )
    torch.testing.assert_close(result.double(), expected, **tolerance)
    none = [row for row, slot in enumerate(slots) if slot == NO_SLOT]
    assert torch.equal(result[none], before[none])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_takes_its_own_way(layout, monkeypatch):
    """Otherwise a way of the comparison above would not be compared."""
    taken = []
    for name in ("_change_batched", "_change_group"):
        monkeypatch.setattr(lora_rows, name, lambda *args, name=name: taken.append((name, args)))
    slots = np.array(LAYOUTS[layout])
    rows = AdapterRows(slots, torch.device("cpu"))
    rows.change(torch.zeros(len(slots), 26), torch.zeros(len(slots), NUM_IN), site_of(EQUAL))
    assert {name for name, _ in taken} == {
        "_change_group" if layout in SEPARATE else "_change_batched"
    }
    if layout not in SEPARATE:
        assert (taken[0][1][3].gather is None) == (layout in IN_PLACE)
