"""Device memory for the weights of `max_loras` adapters, and which adapter is in which slot.

Owns the tensors, and chooses the slot of a new adapter: the least recently used slot, but none that
the same step uses. A slot's unused ranks are zero.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .reader import HostAdapter, SiteWeights
from .sites import Site

# a slot's first ranks of up to three layers, and its number of ranks
NUM_ENDS = 4


@dataclass(slots=True, frozen=True)
class Block:
    """A layer's share of B: ranks [begin, end) change the outputs from `first` on.

    b: [..., ranks, outputs], a view of the slots.
    """

    begin: int
    end: int
    first: int
    b: Tensor


@dataclass(slots=True, frozen=True)
class SlotWeights:
    """One slot's weights at a site. a: [in, rank], a view; ends: of the layers' ranks, from 0."""

    a: Tensor
    ends: tuple[int, ...]
    blocks: Sequence[Block]


@dataclass(slots=True, eq=False)
class SiteSlots:
    """The weights of all slots at one site.

    a: [slots, rank, in]; b: [slots, rank, out], see `sites.py`. begins: the layers' first outputs.
    ranks: of each slot's adapter at this site, 0 if it does not change the site. ends: int32
    [slots, NUM_ENDS], 0 and the end of each layer's ranks; the last repeats. weights: views of each
    slot, computed when it is written, so that a step creates none.
    """

    a: Tensor
    b: Tensor
    begins: tuple[int, ...]
    ranks: list[int]
    ends: Tensor
    weights: list[SlotWeights]

    @classmethod
    def empty(
        cls,
        max_loras: int,
        max_rank: int,
        num_in: int,
        num_outs: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> SiteSlots:
        """Slots without adapters. num_outs: of each layer."""
        assert len(num_outs) < NUM_ENDS, "a site has at most three layers"
        num_ranks = len(num_outs) * max_rank
        a, b = (
            torch.zeros(max_loras, num_ranks, width, dtype=dtype, device=device)
            for width in (num_in, sum(num_outs))
        )
        begins = tuple(sum(num_outs[:index]) for index in range(len(num_outs)))
        ends = torch.zeros(max_loras, NUM_ENDS, dtype=torch.int32, device=device)
        nothing = SlotWeights(a[0, :0].T, (), ())
        return cls(a, b, begins, [0] * max_loras, ends, [nothing] * max_loras)

    def write(self, slot: int, weights: SiteWeights | None) -> None:
        """Put an adapter's weights in a slot; None: it has none at this site."""
        rank, before = (0 if weights is None else weights.rank), self.ranks[slot]
        if max(rank, before) == 0:
            return
        if before > rank:
            self.a[slot, rank:before].zero_()
        self.b[slot, : max(rank, before)].zero_()
        if weights is not None:
            self.a[slot, :rank].copy_(weights.a, non_blocking=True)
            for row, column, block in weights.blocks:
                target = self.b[slot, row : row + block.shape[0], column : column + block.shape[1]]
                target.copy_(block, non_blocking=True)
        ends = self._ends_of(weights)
        self.ends[slot] = torch.tensor(ends, dtype=torch.int32)
        self.ranks[slot] = rank
        blocks = self.blocks_of(self.b[slot], ends)
        self.weights[slot] = SlotWeights(self.a[slot, :rank].T, tuple(ends), blocks)

    def blocks_of(self, b: Tensor, ends: Sequence[int]) -> list[Block]:
        """The layers that have ranks. b: [..., rank, out]; ends: of each layer's ranks, from 0."""
        lasts = (*self.begins[1:], b.shape[-1])
        layers = zip(ends, ends[1:], self.begins, lasts, strict=False)
        return [
            Block(begin, end, first, b[..., begin:end, first:last])
            for begin, end, first, last in layers
            if end > begin
        ]

    def _ends_of(self, weights: SiteWeights | None) -> list[int]:
        ranks = [0] * (NUM_ENDS - 1)
        for _, column, block in () if weights is None else weights.blocks:
            ranks[self.begins.index(column)] = block.shape[0]
        return [sum(ranks[:index]) for index in range(NUM_ENDS)]


class Slots:
    """The slots of all sites, least recently used first."""

    def __init__(
        self, sites: Sequence[Site], max_loras: int, max_rank: int, dtype: torch.dtype
    ) -> None:
        self.by_site: Mapping[Site, SiteSlots] = {
            site: SiteSlots.empty(
                max_loras,
                max_rank,
                site.num_in,
                [part.num_out for part in site.parts],
                dtype,
                site.device,
            )
            for site in sites
        }
        self.max_loras = max_loras
        # digest -> slot, the least recently used first; an empty slot has no digest yet
        self._slot_of: OrderedDict[str, int] = OrderedDict()
        self.num_loads = 0

    @property
    def num_bytes(self) -> int:
        """Device memory of all slots."""
        return sum(one.a.nbytes + one.b.nbytes for one in self.by_site.values())

    @property
    def digests(self) -> list[str]:
        """What is in the slots, the least recently used first."""
        return list(self._slot_of)

    def slot_of(self, digest: str) -> int | None:
        """The slot that an adapter is in."""
        return self._slot_of.get(digest)

    def touch(self, digests: Sequence[str]) -> None:
        """Mark the adapters of a step as the most recently used."""
        for digest in digests:
            if digest in self._slot_of:
                self._slot_of.move_to_end(digest)

    def load(self, digest: str, adapter: HostAdapter) -> int:
        """Put an adapter in an empty slot, or in the least recently used one; the slot."""
        used = set(self._slot_of.values())
        slot = next((one for one in range(self.max_loras) if one not in used), None)
        if slot is None:
            _, slot = self._slot_of.popitem(last=False)
        for site, slots in self.by_site.items():
            slots.write(slot, adapter.weights.get(site))
        self._slot_of[digest] = slot
        self.num_loads += 1
        return slot

    def drop(self, digest: str) -> None:
        """Make an adapter's slot the first to be taken."""
        if digest in self._slot_of:
            self._slot_of.move_to_end(digest, last=False)
