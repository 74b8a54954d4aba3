"""The backend `triton`: this project's kernels, which read keys of any block size in place.

Plans and launches a step's kernels (`triton_kernels.py`). Needs only a CUDA build of torch, which
includes triton.

Rows with one query are launched together and split over their keys, so that a few long rows fill
the GPU. Longer rows are cut into tiles of queries. Text and images differ only in block size and
mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..device_copies import upload
from ..kernels.triton_support import (
    MIN_DOT,
    capability_of,
    operand_of,
    power_of_2,
    why_no_kernels,
)
from .base import AttentionBackend, Geometry, PagedRows

Ints = NDArray[np.int64]

MAX_HEAD_DIM = 256
# float32 operands of wider heads do not fit the registers
MAX_FLOAT32_HEAD_DIM = 64
# queries of a tile; times the heads of a KV group, they are the rows of a product
TILE_QUERIES = 16
KEYS_AT_ONCE = 64
# GPUs with 100 KB of shared memory a processor: fewer keys, so that two programs share one
SMALL_CHIPS = ((8, 6), (8, 9), (12, 0))
# rows times splits that fill a GPU of about 130 processors twice, at 8 KV heads
MAX_SPLITS = 32
LOG2_E = math.log2(math.e)


@dataclass(slots=True, frozen=True)
class Launch:
    """Tiles that one grid computes: int32 [num_tiles] rows, and first queries within their rows.

    block_q: most queries of a tile; num_splits: parts that the keys are cut into.
    """

    tile_rows: Tensor
    tile_offsets: Tensor
    block_q: int
    num_splits: int


@dataclass(slots=True, frozen=True)
class TritonPlan:
    """A step's rows on the device, and the launches that cover their queries.

    query_starts: int32 [num_rows + 1]; key_lens: int32 [num_rows]; block_table: int32 [num_rows,
    most blocks].
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

    def __init__(self, num_splits: int | None = None) -> None:
        """num_splits: parts of the keys of one-query rows; None chooses by the rows."""
        from . import triton_kernels

        self._kernels = triton_kernels
        self._num_splits = num_splits

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
        """The launches of these rows; see `AttentionBackend.prepare`."""
        lens = rows.query_lens
        single, longer = np.flatnonzero(lens == 1), np.flatnonzero(lens > 1)
        launches = []
        if len(single):
            longest = int(rows.key_lens[single].max())
            num_splits = self._num_splits or choose_splits(len(single), longest)
            launches.append(_launch(single, np.zeros_like(single), 1, num_splits, device))
        if len(longer):
            counts = -(-lens[longer] // TILE_QUERIES)
            offsets = np.concatenate([np.arange(count) for count in counts]) * TILE_QUERIES
            launches.append(_launch(np.repeat(longer, counts), offsets, TILE_QUERIES, 1, device))
        return TritonPlan(
            query_starts=_upload(rows.query_start_loc, device),
            key_lens=_upload(rows.key_lens, device),
            block_table=_upload(rows.block_table, device),
            block_size=rows.block_size,
            is_causal=rows.is_causal,
            launches=launches,
        )

    def fixed_plan(
        self, key_lens: Tensor, block_table: Tensor, block_size: int, longest: int
    ) -> TritonPlan:
        """A plan for graphs: one query a row, over tensors whose values may change later.

        key_lens: int32 [num_rows]; block_table: int32 [num_rows, width], both on the device.
        longest: keys of the longest row, which decides the number of splits; longer rows are still
        correct.
        """
        num_rows, device = len(key_lens), key_lens.device
        starts = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
        num_splits = self._num_splits or choose_splits(num_rows, longest)
        offsets = torch.zeros(num_rows, dtype=torch.int32, device=device)
        return TritonPlan(
            query_starts=starts,
            key_lens=key_lens,
            block_table=block_table,
            block_size=block_size,
            is_causal=False,
            launches=[Launch(starts[:-1], offsets, 1, num_splits)],
        )

    def attend(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, plan: TritonPlan, scale: float
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
        key_cache: Tensor,
        value_cache: Tensor,
        output: Tensor,
        plan: TritonPlan,
        launch: Launch,
        scale: float,
    ) -> None:
        num_heads, head_dim = query.shape[1:]
        num_kv_heads, num_splits = key_cache.shape[-2], launch.num_splits
        group, num_tiles = num_heads // num_kv_heads, len(launch.tile_rows)
        padded_dim = max(MIN_DOT, power_of_2(head_dim))
        num_query_rows = max(MIN_DOT, power_of_2(launch.block_q * group))
        partial, lse = output, output
        if num_splits > 1:
            rows = (num_splits, num_tiles, num_heads)
            partial = torch.empty((*rows, head_dim), dtype=torch.float32, device=query.device)
            lse = torch.empty(rows, dtype=torch.float32, device=query.device)
        self._kernels.attend_kernel[num_tiles, num_kv_heads, num_splits](
            query,
            key_cache,
            value_cache,
            output,
            partial,
            lse,
            launch.tile_rows,
            launch.tile_offsets,
            plan.query_starts,
            plan.key_lens,
            plan.block_table,
            query.stride(0),
            plan.block_table.stride(0),
            scale * LOG2_E,
            BLOCK_SIZE=plan.block_size,
            NUM_KV_HEADS=num_kv_heads,
            GROUP=group,
            HEAD_DIM=head_dim,
            PADDED_DIM=padded_dim,
            BLOCK_Q=launch.block_q,
            M=num_query_rows,
            BLOCK_N=keys_at_once(query.device, num_query_rows),
            NUM_SPLITS=num_splits,
            # a row's only query is its last token, so it sees every key
            IS_CAUSAL=plan.is_causal and launch.block_q > 1,
            OPERAND=operand_of(query),
            num_warps=max(4, num_query_rows // 16),
            num_stages=3,
        )
        if num_splits > 1:
            self._kernels.merge_kernel[num_tiles, num_heads](
                partial,
                lse,
                output,
                launch.tile_rows,
                plan.query_starts,
                num_heads,
                HEAD_DIM=head_dim,
                PADDED_DIM=padded_dim,
                NUM_SPLITS=num_splits,
                PADDED_SPLITS=power_of_2(num_splits),
            )

    def write(
        self, keys: Tensor, values: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor
    ) -> None:
        """See `AttentionBackend.write`; a token with a negative slot is skipped."""
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


def choose_splits(num_rows: int, longest: int) -> int:
    """How many parts to cut the keys of one-query rows into, to fill a GPU with programs.

    longest: keys of the longest row. The result is a power of two, so that few kernels are
    compiled; a part has at least 2 * KEYS_AT_ONCE keys.
    """
    most = max(1, min(MAX_SPLITS // num_rows, longest // (2 * KEYS_AT_ONCE)))
    return 1 << (most.bit_length() - 1)


def _launch(
    rows: Ints, offsets: Ints, block_q: int, num_splits: int, device: torch.device
) -> Launch:
    return Launch(_upload(rows, device), _upload(offsets, device), block_q, num_splits)


def _upload(array: Ints, device: torch.device) -> Tensor:
    return upload(array, device, np.int32)


def _heads_together(states: Tensor) -> Tensor:
    """The tensor, [tokens, heads, head_dim], with contiguous heads in each token."""
    head_dim = states.shape[-1]
    is_together = states.stride(-1) == 1 and states.stride(-2) == head_dim
    return states if is_together else states.contiguous()
