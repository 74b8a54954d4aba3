"""Which rows of a product use which adapter, and the change of the product by torch.

    one adapter's rows, in one piece    the product's rows are changed in place, nothing is copied
    few adapters                        each adapter's rows are gathered and their change added
    many adapters of few rows each      gathered into one batch of equal sizes: two batched products

Rows without an adapter are not touched.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..device_copies import upload
from .slots import SiteSlots

NO_SLOT = -1
# more adapters than this in a step are batched, if the padding at most doubles the rows
FEW_ADAPTERS = 2
MOST_PADDED = 2
MAX_BATCHED_ROWS = 256
# rows that are gathered at once, so that a long prompt takes no second copy of its products
MAX_GATHERED_ROWS = 256


@dataclass(slots=True, frozen=True)
class Group:
    """The rows of one slot: [begin, end) if they are in one piece, else `index`, int64 [rows]."""

    slot: int
    num_rows: int
    begin: int
    index: Tensor | None

    def of(self, states: Tensor) -> Tensor:
        """The group's rows of [rows, width], which are in one piece: a view."""
        return states[self.begin : self.begin + self.num_rows]


@dataclass(slots=True, frozen=True)
class Batched:
    """All groups side by side, padded to the largest.

    gather: int64 [slots * most], the row of each place, 0 for padding. places: int64 [rows], the
    places that are rows; rows: int64 [rows], those rows. num_slots: the first slots, used or not.
    """

    gather: Tensor
    places: Tensor
    rows: Tensor
    num_slots: int


class AdapterRows:
    """The rows of one step, or of one image pass, on one device."""

    def __init__(self, slots: NDArray[np.int64], device: torch.device) -> None:
        """slots: of each row, NO_SLOT without an adapter; at least one row has an adapter."""
        self.slots = slots
        used = np.unique(slots[slots != NO_SLOT])
        self._groups = [_group(int(slot), np.flatnonzero(slots == slot), device) for slot in used]
        self._batched = _batched(slots, used, device) if len(used) > FEW_ADAPTERS else None

    def changes(self, site: SiteSlots) -> bool:
        """Whether an adapter of the rows changes a site."""
        return any(site.ranks[group.slot] for group in self._groups)

    def change(self, result: Tensor, states: Tensor, site: SiteSlots) -> None:
        """Add the adapters' change to a product, in place.

        result: [rows, out], contiguous; states: [rows, in].
        """
        states = states.to(site.a.dtype)
        if self._batched is not None:
            most = max(site.ranks[group.slot] for group in self._groups)
            return _change_batched(result, states, site, self._batched, most)
        for group in self._groups:
            _change_group(result, states, site, group)


class WholeRows:
    """All rows of any product, of one slot: a pass of images with one adapter."""

    def __init__(self, slot: int) -> None:
        self._slot = slot

    def changes(self, site: SiteSlots) -> bool:
        """Whether the adapter changes a site."""
        return site.ranks[self._slot] > 0

    def change(self, result: Tensor, states: Tensor, site: SiteSlots) -> None:
        """See `AdapterRows.change`."""
        group = Group(self._slot, len(result), 0, None)
        _change_group(result, states.to(site.a.dtype), site, group)


def _change_group(result: Tensor, states: Tensor, site: SiteSlots, group: Group) -> None:
    rank = site.ranks[group.slot]
    if rank == 0:
        return
    a, b = site.a[group.slot, :rank], site.b[group.slot, :rank]
    if group.index is not None:
        for rows in group.index.split(MAX_GATHERED_ROWS):
            change = (states.index_select(0, rows) @ a.T) @ b
            result.index_add_(0, rows, change.to(result.dtype))
        return
    low, changed = group.of(states) @ a.T, group.of(result)
    if b.dtype == result.dtype:
        changed.addmm_(low, b)
    else:
        changed.add_(low @ b)


def _change_batched(
    result: Tensor, states: Tensor, site: SiteSlots, rows: Batched, rank: int
) -> None:
    gathered = states.index_select(0, rows.gather).view(rows.num_slots, -1, states.shape[1])
    low = torch.bmm(gathered, site.a[: rows.num_slots, :rank].transpose(1, 2))
    change = torch.bmm(low, site.b[: rows.num_slots, :rank]).flatten(0, 1)
    result.index_add_(0, rows.rows, change.index_select(0, rows.places).to(result.dtype))


def sorted_rows(
    slots: NDArray[np.int64], max_loras: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows with an adapter, sorted by slot, and the first place of each slot, [slots + 1]."""
    rows = np.flatnonzero(slots != NO_SLOT)
    order = rows[np.argsort(slots[rows], kind="stable")]
    counts = np.bincount(slots[rows], minlength=max_loras)
    return order, np.concatenate([[0], np.cumsum(counts)])


def _group(slot: int, rows: NDArray[np.int64], device: torch.device) -> Group:
    begin, count = int(rows[0]), len(rows)
    is_piece = int(rows[-1]) - begin + 1 == count
    return Group(slot, count, begin, None if is_piece else upload(rows, device))


def _batched(
    slots: NDArray[np.int64], used: NDArray[np.int64], device: torch.device
) -> Batched | None:
    """All groups in one batch; None if padding costs more than separate products."""
    num_slots = int(used[-1]) + 1
    rows = [np.flatnonzero(slots == slot) for slot in range(num_slots)]
    most, total = max(map(len, rows)), sum(map(len, rows))
    padded = num_slots * most
    if padded > min(MAX_BATCHED_ROWS, MOST_PADDED * total):
        return None
    gather = np.zeros((num_slots, most), dtype=np.int64)
    for places, one in zip(gather, rows, strict=True):
        places[: len(one)] = one
    places = np.concatenate(
        [slot * most + np.arange(len(one), dtype=np.int64) for slot, one in enumerate(rows)]
    )
    gathered = upload(gather.reshape(-1), device)
    return Batched(
        gathered, upload(places, device), upload(np.concatenate(rows), device), num_slots
    )
