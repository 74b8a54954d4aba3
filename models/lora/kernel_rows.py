"""Launches the kernels of several adapters' products: their tiles, and how inputs are split.

Two launches for each product, whatever the number of adapters. Imported only if triton is
installed.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..device_copies import upload_together
from ..kernels.triton_support import MIN_DOT, operand_of
from . import lora_kernels
from .reader import SiteWeights
from .rows import NO_SLOT, AdapterRows, sorted_rows
from .slots import NUM_ENDS, SiteSlots

BLOCK_M = MIN_DOT
BLOCK_R = MIN_DOT
BLOCK_K = 128
BLOCK_N = 64
# inputs of a split: few rows and ranks leave a GPU without work otherwise
MIN_SPLIT = 512
MAX_SPLITS = 8


class KernelRows:
    """The rows of one step on a GPU; changes products like `rows.AdapterRows`."""

    def __init__(self, slots: NDArray[np.int64], max_loras: int, device: torch.device) -> None:
        """slots: of each row, NO_SLOT without an adapter."""
        self._used = [int(slot) for slot in np.unique(slots[slots != NO_SLOT])]
        places, starts = sorted_rows(slots, max_loras)
        self._num_rows = len(places)
        self._order, self._starts = upload_together(
            [places.astype(np.int32), starts.astype(np.int32)], device
        )

    def changes(self, site: SiteSlots) -> bool:
        """Whether an adapter of the rows changes a site."""
        return any(site.ranks[slot] for slot in self._used)

    def change(self, result: Tensor, states: Tensor, site: SiteSlots) -> None:
        """Add the adapters' change to a product, in place; see `AdapterRows.change`."""
        states = states if states.stride(-1) == 1 else states.contiguous()
        launch(result, states, site, self._order, self._starts, self._num_rows)


class RecordedRows:
    """Rows whose layout is in fixed memory, so that recorded steps read another one each time."""

    def __init__(self, order: Tensor, starts: Tensor) -> None:
        """order: int32 [most rows]; starts: int32 [max_loras + 1]; see `sorted_rows`."""
        self._order, self._starts = order, starts

    def changes(self, site: SiteSlots) -> bool:
        """True: an adapter of a later step may change any site. Without one the kernels stop."""
        return True

    def change(self, result: Tensor, states: Tensor, site: SiteSlots) -> None:
        """See `KernelRows.change`."""
        launch(result, states, site, self._order, self._starts, len(result))


def launch(
    result: Tensor, states: Tensor, site: SiteSlots, order: Tensor, starts: Tensor, num_rows: int
) -> None:
    """Both kernels. result: [rows, out]; states: [rows, in]; order, starts: int32, by place.

    num_rows: how many places there are at most; the grid depends on it alone.
    """
    max_loras, num_ranks, num_in = site.a.shape
    num_out = site.b.shape[2]
    num_splits = max(1, min(MAX_SPLITS, num_in // MIN_SPLIT))
    per_split = -(-num_in // (num_splits * BLOCK_K)) * BLOCK_K
    num_splits = -(-num_in // per_split)
    low = torch.empty(num_splits, num_rows, num_ranks, dtype=torch.float32, device=states.device)
    lines, rank_tiles = -(-num_rows // BLOCK_M), -(-num_ranks // BLOCK_R)
    lora_kernels.low_rank_kernel[lines, rank_tiles * num_splits, max_loras](
        states,
        site.a,
        low,
        order,
        starts,
        site.ends,
        num_rows,
        states.stride(0),
        per_split,
        IN=num_in,
        RANKS=num_ranks,
        NUM_ENDS=NUM_ENDS,
        BLOCK_M=BLOCK_M,
        BLOCK_R=BLOCK_R,
        BLOCK_K=BLOCK_K,
        RANK_TILES=rank_tiles,
        OPERAND=operand_of(site.a),
        num_warps=4,
        num_stages=3,
    )
    second, third = (*site.begins[1:], num_out, num_out)[:2]
    lora_kernels.add_change_kernel[lines, -(-num_out // BLOCK_N), max_loras](
        low,
        site.b,
        result,
        order,
        starts,
        site.ends,
        num_rows,
        result.stride(0),
        OUT=num_out,
        RANKS=num_ranks,
        NUM_ENDS=NUM_ENDS,
        SECOND=second,
        THIRD=third,
        SPLITS=num_splits,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_R=BLOCK_R,
        OPERAND=operand_of(site.a),
        num_warps=4,
        num_stages=3,
    )


def trial_pairs(device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Results of the kernels and of torch in float32, of a site with three layers."""
    slots = np.array([2, NO_SLOT, 0, 2, 2, 0, NO_SLOT, 3] * 5, dtype=np.int64)
    given, expected = trial_site(dtype, device), trial_site(torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    num_in, num_out = given.a.shape[2], given.b.shape[2]
    states = torch.randn(len(slots), num_in, generator=generator).to(dtype)
    before = torch.randn(len(slots), num_out, generator=generator).to(dtype)
    actual, wanted = before.to(device, copy=True), before.float()
    KernelRows(slots, len(given.ranks), device).change(actual, states.to(device), given)
    AdapterRows(slots, torch.device("cpu")).change(wanted, states.float(), expected)
    return [(actual.cpu(), wanted)]


def trial_site(
    dtype: torch.dtype,
    device: torch.device,
    num_in: int = 1100,
    num_outs: tuple[int, ...] = (96, 40, 24),
    max_rank: int = 20,
) -> SiteSlots:
    """Four slots of a site with random weights: one is empty, the others have different ranks."""
    generator = torch.Generator().manual_seed(0)
    begins = tuple(int(begin) for begin in np.cumsum([0, *num_outs[:-1]]))
    site = SiteSlots.empty(4, max_rank, num_in, num_outs, dtype, device)
    for slot, wanted in ((0, (4, 0, 7)), (2, (max_rank,) * 3), (3, (1, 0, 1))):
        ranks = [min(rank, max_rank) for rank, _ in zip(wanted, num_outs, strict=False)]
        a = torch.randn(sum(ranks), num_in, generator=generator) / num_in**0.5
        blocks, row = [], 0
        for begin, width, rank in zip(begins, num_outs, ranks, strict=True):
            if rank:
                blocks.append((row, begin, torch.randn(rank, width, generator=generator)))
            row += rank
        rounded = [(row, begin, block.bfloat16()) for row, begin, block in blocks]
        site.write(slot, SiteWeights(a.bfloat16(), rounded))
    return site
