"""Which rows of a product use which adapter, and the change of the product by torch.

    one adapter's rows, in one piece    the product's rows are changed in place, nothing is copied
    few adapters                        each adapter's rows are gathered and their change added
    many adapters of few rows each      one batch of equal sizes, gathered unless it is in order:
                                        two batched products

Rows without an adapter are not touched. The zeros of a block-diagonal B are skipped, unless the
adapters of a batch have different ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..device_copies import upload
from .slots import Block, SiteSlots

NO_SLOT = -1
# more adapters than this in a step are batched, unless padding adds more rows than half
FEW_ADAPTERS = 2
MOST_PADDED = 1.5
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
        is_all = self.num_rows == len(states)
        return states if is_all else states.narrow(0, self.begin, self.num_rows)


@dataclass(slots=True, frozen=True)
class Batched:
    """The rows of slots [first, end), slot by slot, padded to the largest number, `most`.

    gather: int64 [slots * most], the row of each place, 0 for padding. rows: int64 [rows], the rows
    with an adapter; places: int64 [rows], their places. gather is None if each row is in its place
    already; rows is None if every row has an adapter.
    """

    first: int
    end: int
    most: int
    gather: Tensor | None
    places: Tensor
    rows: Tensor | None


class AdapterRows:
    """The rows of one step, or of one image pass, on one device."""

    def __init__(self, slots: NDArray[np.int64], device: torch.device) -> None:
        """slots: of each row, NO_SLOT without an adapter; at least one row has an adapter."""
        self.slots = slots
        self._used: list[int] = np.unique(slots[slots != NO_SLOT]).tolist()
        self._batched = _batched(slots, self._used, device)
        self._groups = [
            _group(slot, np.flatnonzero(slots == slot), device)
            for slot in (self._used if self._batched is None else ())
        ]

    def changes(self, site: SiteSlots) -> bool:
        """Whether an adapter of the rows changes a site."""
        return any(site.ranks[slot] for slot in self._used)

    def change(self, result: Tensor, states: Tensor, site: SiteSlots) -> None:
        """Add the adapters' change to a product, in place.

        result: [rows, out], contiguous; states: [rows, in].
        """
        states = states.to(site.a.dtype)
        if self._batched is not None:
            return _change_batched(result, states, site, self._batched, self._used)
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
    weights = site.weights[group.slot]
    if not weights.blocks:
        return
    if group.index is None:
        low, changed = group.of(states) @ weights.a, group.of(result)
        for block in weights.blocks:
            _add_product(_outputs(changed, block), _ranks(low, block), block.b)
        return
    for rows in group.index.split(MAX_GATHERED_ROWS):
        low = states.index_select(0, rows) @ weights.a
        for block in weights.blocks:
            change = _ranks(low, block) @ block.b
            _outputs(result, block).index_add_(0, rows, change.to(result.dtype))


def _change_batched(
    result: Tensor, states: Tensor, site: SiteSlots, rows: Batched, used: Sequence[int]
) -> None:
    if rows.gather is not None:
        states = states.index_select(0, rows.gather)
    rank, blocks = _common_blocks(site, rows, used)
    a = site.a[rows.first : rows.end, :rank].transpose(1, 2)
    low = torch.bmm(states.view(-1, rows.most, states.shape[1]), a)
    for block in blocks:
        outputs, ranks = _outputs(result, block), _ranks(low, block)
        if rows.gather is None:
            _add_product(outputs.unflatten(0, (-1, rows.most)), ranks, block.b)
            continue
        change = torch.bmm(ranks, block.b).flatten(0, 1).index_select(0, rows.places)
        if rows.rows is None:
            outputs.add_(change)
        else:
            outputs.index_add_(0, rows.rows, change.to(result.dtype))


def _common_blocks(
    site: SiteSlots, rows: Batched, used: Sequence[int]
) -> tuple[int, Sequence[Block]]:
    """How many ranks the slots have at most, and their layers: one for all if they differ."""
    rank = max([site.ranks[slot] for slot in used])
    b = site.b[rows.first : rows.end, :rank]
    ends = {site.weights[slot].ends for slot in used}
    return rank, site.blocks_of(b, ends.pop()) if len(ends) == 1 else [Block(0, rank, 0, b)]


def _outputs(result: Tensor, block: Block) -> Tensor:
    """The outputs of [rows, out] that a layer changes."""
    width = block.b.shape[-1]
    return result if width == result.shape[1] else result.narrow(1, block.first, width)


def _ranks(low: Tensor, block: Block) -> Tensor:
    """A layer's share of [..., ranks]."""
    is_all = block.end - block.begin == low.shape[-1]
    return low if is_all else low[..., block.begin : block.end]


def _add_product(outputs: Tensor, ranks: Tensor, b: Tensor) -> None:
    """Add the product to [..., rows, outputs] in place, in one operation if the types are equal."""
    if b.dtype != outputs.dtype:
        outputs.add_(ranks @ b)
    elif b.dim() == 3:
        outputs.baddbmm_(ranks, b)
    else:
        outputs.addmm_(ranks, b)


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


def _batched(slots: NDArray[np.int64], used: Sequence[int], device: torch.device) -> Batched | None:
    """The layout of one batch; None if separate products cost less."""
    if len(used) <= FEW_ADAPTERS:
        return None
    first, end = used[0], used[-1] + 1
    of_slots = [np.flatnonzero(slots == slot) for slot in range(first, end)]
    rows = np.concatenate(of_slots)
    most = max(map(len, of_slots))
    padded = most * len(of_slots)
    if padded > min(MAX_BATCHED_ROWS, MOST_PADDED * len(rows)):
        return None
    gather = np.zeros((len(of_slots), most), dtype=np.int64)
    for places, one in zip(gather, of_slots, strict=True):
        places[: len(one)] = one
    places = np.concatenate([i * most + np.arange(len(one)) for i, one in enumerate(of_slots)])
    order, flat = np.argsort(rows), gather.reshape(-1)
    is_in_place = len(flat) == len(slots) and bool((flat == np.arange(len(slots))).all())
    return Batched(
        first,
        end,
        most,
        None if is_in_place else upload(flat, device),
        upload(places[order], device, np.int64),
        None if len(rows) == len(slots) else upload(rows[order], device),
    )
