"""The backend `triton`: this project's kernels, which read keys of any block size in place.

Plans and launches a step's kernels (`triton_kernels.py`). Needs only a CUDA build of torch, which
includes triton.

Rows with one query are launched together. Longer rows are cut into tiles of queries. Both are cut
into pieces of keys (`work_items.py`), so that a few long rows fill the GPU and delay no other. Text
and images differ only in block size and mask.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..device_copies import upload_together
from ..kernels.triton_support import (
    MIN_DOT,
    capability_of,
    operand_of,
    power_of_2,
    why_no_kernels,
)
from .base import AttentionBackend, Geometry, PagedRows, PlanLists
from .int8_states import Int8States, States
from .work_items import (
    KEYS_AT_ONCE,
    MIN_PIECE,
    MIN_TILE_PIECE,
    NUM_PROGRAMS,
    Ints,
    Pieces,
    WorkItems,
    WorkLayout,
    cut,
    num_extra_items,
    write,
)

MAX_HEAD_DIM = 256
# float32 operands of wider heads do not fit the registers
MAX_FLOAT32_HEAD_DIM = 64
# queries of a tile; times the heads of a KV group, they are the rows of a product
TILE_QUERIES = 16
# GPUs with 100 KB of shared memory a processor: fewer keys, so that two programs share one
SMALL_CHIPS = ((8, 6), (8, 9), (12, 0))
# of a model whose sizes are not known
NUM_KV_HEADS = 8
# pieces that a merging program reads at a time
MERGED_AT_ONCE = 16
LOG2_E = math.log2(math.e)


@dataclass(slots=True, frozen=True)
class Launch:
    """Items that one grid computes.

    offsets: int32 [num_items], an item's first query within its row; any tensor if block_q is 1.
    block_q: most queries of an item.
    """

    items: WorkItems[Tensor]
    offsets: Tensor
    block_q: int

    @property
    def is_cut(self) -> bool:
        """Whether a row's keys may be in several pieces."""
        return len(self.items.split) > 0


@dataclass(slots=True, frozen=True)
class TritonPlan:
    """A step's rows on the device, and the launches that cover their queries.

    query_starts: int32 [num_rows + 1]; key_lens: int32 [num_rows]; block_table: int32, rows of ids;
    each launch has their stride.
    """

    query_starts: Tensor
    key_lens: Tensor
    block_table: Tensor
    block_size: int
    is_causal: bool
    launches: list[Launch]


class TritonBackend(AttentionBackend):
    """Attention by this project's Triton kernels."""

    name: ClassVar[str] = "triton"

    def __init__(self, piece: int | None = None) -> None:
        """piece: keys of a piece of any row; None chooses by the rows."""
        from . import triton_kernels

        self._kernels = triton_kernels
        self._piece = piece
        self._num_kv_heads = NUM_KV_HEADS

    def sized_for(self, geometry: Geometry) -> TritonBackend:
        """See `AttentionBackend.sized_for`: fewer KV heads need more pieces to fill a GPU."""
        sized = copy.copy(self)
        sized._num_kv_heads = geometry.num_kv_heads
        return sized

    @classmethod
    def why_not(cls, geometry: Geometry) -> str | None:
        if geometry.device.type != "cuda":
            return f"it needs a CUDA device, and this is {geometry.device}"
        if geometry.head_dim > MAX_HEAD_DIM:
            return f"head_dim {geometry.head_dim} is over {MAX_HEAD_DIM}"
        if geometry.dtype == torch.float32 and geometry.head_dim > MAX_FLOAT32_HEAD_DIM:
            return f"float32 heads of {geometry.head_dim} are over {MAX_FLOAT32_HEAD_DIM}"
        return why_no_kernels(geometry.device)

    def prepare(self, rows: PagedRows, device: torch.device, dtype: torch.dtype) -> TritonPlan:
        """The launches of these rows; see `AttentionBackend.prepare`. One copy to the device."""
        lists = self.lists(rows, device, dtype)
        plan: TritonPlan = lists.plan(upload_together(lists.arrays, device))
        return plan

    def lists(self, rows: PagedRows, device: torch.device, dtype: torch.dtype) -> PlanLists:
        """See `AttentionBackend.lists`; nothing is copied yet."""
        parts = self._parts(rows)
        arrays = [rows.query_start_loc, rows.key_lens, rows.block_table]
        arrays += [array for part in parts.values() for array in part]

        def plan(copies: Sequence[Tensor]) -> TritonPlan:
            starts, key_lens, table, *rest = copies
            left = iter(rest)
            return TritonPlan(
                query_starts=starts,
                key_lens=key_lens,
                block_table=table,
                block_size=rows.block_size,
                is_causal=rows.is_causal,
                launches=[_launch(islice(left, len(part)), q) for q, part in parts.items()],
            )

        return PlanLists([array.astype(np.int32) for array in arrays], plan)

    def _parts(self, rows: PagedRows) -> dict[int, list[Ints]]:
        """What each launch reads, by the most queries of its items."""
        lens, parts = rows.query_lens, {}
        single, longer = np.flatnonzero(lens == 1), np.flatnonzero(lens > 1)
        if len(single):
            num_extra = num_extra_items(len(single), self._num_kv_heads)
            pieces = self._cut(rows.key_lens[single], num_extra, MIN_PIECE)
            parts[1] = _arrays(pieces, single, np.zeros_like(single), rows)
        if len(longer):
            tiles, offsets, num_seen = _query_tiles(rows, longer)
            num_extra = max(0, NUM_PROGRAMS // self._num_kv_heads - len(tiles))
            pieces = self._cut(num_seen, num_extra, MIN_TILE_PIECE)
            parts[TILE_QUERIES] = _arrays(pieces, tiles, offsets, rows)
        return parts

    def _cut(self, num_keys: Ints, num_extra: int, least: int) -> Pieces:
        return cut(num_keys, num_extra, self._piece, least)

    def work_layout(self, num_rows: int, longest: int) -> WorkLayout:
        """Room for the items of a recorded step. longest: keys that a row may have."""
        most = num_rows * max(1, -(-longest // (self._piece or MIN_PIECE)))
        if self._piece is None:
            most = min(most, num_rows + num_extra_items(num_rows, self._num_kv_heads))
        return WorkLayout(num_rows, most)

    def write_work(
        self,
        work: WorkItems[NDArray[np.int32]],
        key_lens: NDArray[np.int32],
        table_stride: int,
    ) -> None:
        """Write the items of a recorded step's rows, on the host.

        work: of a `work_layout` of len(key_lens) rows. table_stride: ids of a row of the table.
        """
        num_extra = len(work.rows) - len(key_lens)
        pieces = self._cut(key_lens.astype(np.int64), num_extra, MIN_PIECE)
        write(work, pieces, table_stride)

    def fixed_plan(
        self, key_lens: Tensor, block_table: Tensor, block_size: int, work: WorkItems[Tensor]
    ) -> TritonPlan:
        """A plan for graphs: one query a row, over tensors whose values may change later.

        key_lens: int32 [num_rows]; block_table: int32, rows of ids, whose stride `work` has; work:
        what `write_work` wrote. All on the device.
        """
        starts = torch.arange(len(key_lens) + 1, dtype=torch.int32, device=key_lens.device)
        return TritonPlan(
            query_starts=starts,
            key_lens=key_lens,
            block_table=block_table,
            block_size=block_size,
            is_causal=False,
            launches=[Launch(work, work.rows, 1)],
        )

    def attend(
        self, query: Tensor, key_cache: States, value_cache: States, plan: TritonPlan, scale: float
    ) -> Tensor:
        """The attention output of all launches; see `AttentionBackend.attend`."""
        query = _heads_together(query)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        # triton launches on the current device; layers may be on several
        with torch.cuda.device_of(query):
            for launch in plan.launches:
                self._attend(query, key_cache, value_cache, output, plan, launch, scale)
        return output

    def _attend(
        self,
        query: Tensor,
        key_cache: States,
        value_cache: States,
        output: Tensor,
        plan: TritonPlan,
        launch: Launch,
        scale: float,
    ) -> None:
        num_heads, head_dim = query.shape[1:]
        num_kv_heads, items, block_q = key_cache.shape[-2], launch.items, launch.block_q
        group, num_items = num_heads // num_kv_heads, len(items.rows)
        padded_dim = max(MIN_DOT, power_of_2(head_dim))
        num_query_rows = max(MIN_DOT, power_of_2(block_q * group))
        # a row's only query is its last token, so it sees every key
        is_causal = plan.is_causal and block_q > 1
        partial, lse = output, output
        keys, values, key_scales, value_scales = key_cache, value_cache, output, output
        if isinstance(key_cache, Int8States) and isinstance(value_cache, Int8States):
            keys, values = key_cache.codes, value_cache.codes
            key_scales, value_scales = key_cache.scales, value_cache.scales
        if launch.is_cut:
            rows = (num_items, block_q, num_heads)
            partial = torch.empty((*rows, head_dim), dtype=torch.float32, device=query.device)
            lse = torch.empty(rows, dtype=torch.float32, device=query.device)
        self._kernels.attend_kernel[num_kv_heads, num_items](
            query,
            keys,
            values,
            key_scales,
            value_scales,
            output,
            partial,
            lse,
            items.rows,
            launch.offsets,
            items.pieces,
            items.sizes,
            plan.query_starts,
            plan.key_lens,
            plan.block_table,
            query.stride(0),
            scale * LOG2_E,
            BLOCK_SIZE=plan.block_size,
            NUM_KV_HEADS=num_kv_heads,
            GROUP=group,
            HEAD_DIM=head_dim,
            PADDED_DIM=padded_dim,
            BLOCK_Q=block_q,
            M=num_query_rows,
            BLOCK_N=keys_at_once(query.device, num_query_rows),
            IS_CUT=launch.is_cut,
            IS_CAUSAL=is_causal,
            IS_INT8=isinstance(key_cache, Int8States),
            OPERAND=operand_of(query),
            num_warps=max(4, num_query_rows // 16),
            num_stages=3,
        )
        if launch.is_cut:
            self._kernels.merge_kernel[len(items.split) * block_q, num_heads](
                partial,
                lse,
                output,
                items.split,
                items.rows,
                launch.offsets,
                items.sizes,
                plan.query_starts,
                plan.key_lens,
                num_heads,
                HEAD_DIM=head_dim,
                PADDED_DIM=padded_dim,
                BLOCK_Q=block_q,
                IS_CAUSAL=is_causal,
                AT_ONCE=MERGED_AT_ONCE,
            )

    def write(
        self, keys: Tensor, values: Tensor, key_cache: States, value_cache: States, slots: Tensor
    ) -> None:
        """See `AttentionBackend.write`; a token with a negative slot is skipped, but in int8."""
        if isinstance(key_cache, Int8States):
            super().write(keys, values, key_cache, value_cache, slots)
            return
        width = keys.shape[-2] * keys.shape[-1]
        keys, values = _heads_together(keys), _heads_together(values)
        with torch.cuda.device_of(keys):
            self._kernels.write_kernel[(len(slots),)](
                keys,
                values,
                key_cache,
                value_cache,
                slots,
                keys.stride(0),
                values.stride(0),
                WIDTH=width,
                PADDED_WIDTH=power_of_2(width),
            )


def keys_at_once(device: torch.device, num_query_rows: int) -> int:
    """The keys that a program loads at a time: fewer for decodes on a chip with little memory."""
    is_small = capability_of(device) in SMALL_CHIPS and num_query_rows == MIN_DOT
    return KEYS_AT_ONCE // 2 if is_small else KEYS_AT_ONCE


def _query_tiles(rows: PagedRows, longer: Ints) -> tuple[Ints, Ints, Ints]:
    """Tiles of rows with several queries: their rows, first queries, and keys that they see."""
    lens = rows.query_lens[longer]
    counts = -(-lens // TILE_QUERIES)
    offsets = np.concatenate([np.arange(count) for count in counts]) * TILE_QUERIES
    tiles, num_seen = np.repeat(longer, counts), np.repeat(rows.key_lens[longer], counts)
    if rows.is_causal:
        unseen = np.repeat(lens, counts) - offsets - TILE_QUERIES
        num_seen = num_seen - np.maximum(0, unseen)
    return tiles, offsets, num_seen


def _arrays(pieces: Pieces, rows: Ints, offsets: Ints, paged: PagedRows) -> list[Ints]:
    """What a launch reads, in the order of `_launch`; rows, offsets: of the tiles."""
    sizes = np.array([pieces.size, paged.block_table.shape[1]])
    return [rows[pieces.tiles], offsets[pieces.tiles], pieces.pieces, pieces.split, sizes]


def _launch(lists: Iterable[Tensor], block_q: int) -> Launch:
    rows, offsets, numbers, split, sizes = lists
    return Launch(WorkItems(rows, numbers, split, sizes), offsets, block_q)


def _heads_together(states: Tensor) -> Tensor:
    """The tensor, [tokens, heads, head_dim], with contiguous heads in each token."""
    head_dim = states.shape[-1]
    is_together = states.stride(-1) == 1 and states.stride(-2) == head_dim
    return states if is_together else states.contiguous()
