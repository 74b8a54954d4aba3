"""What both FlashAttention backends share: their plans, and the limits of their kernels.

Text is read through block tables, images tile by tile (`tiles.py`); a backend adds its kernels.

FlashAttention 2's paged kernels, in the package and in torch, need: half precision, compute
capability 8.0, head_dim a multiple of 8 up to 256, and blocks in multiples of 256 tokens. Their
causal masks are aligned to the last key.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..device_copies import upload
from ..kernels.triton_support import why_too_old
from .base import AttentionBackend, Geometry, PagedRows
from .int8_states import States
from .tiles import RaggedCall, TilePart, attend_tiles, plan_tiles

MAX_HEAD_DIM = 256


@dataclass(slots=True, frozen=True)
class PagedCall:
    """Rows over a pool's blocks: row i's queries are the last tokens of its keys.

    query_starts, key_starts, capacity_starts: int32 [num_rows + 1], cumulative counts of queries,
    of keys and of the table's slots; key_lens: int32 [num_rows]; block_table: int32
    [num_rows, max blocks]. max_queries, max_keys: of the longest row. block_size: in tokens.
    """

    query_starts: Tensor
    key_starts: Tensor
    capacity_starts: Tensor
    key_lens: Tensor
    block_table: Tensor
    max_queries: int
    max_keys: int
    block_size: int

    @property
    def is_causal(self) -> bool:
        """False for single last tokens: they see every key, and need no mask."""
        return self.max_queries > 1


FlashPlan = PagedCall | list[TilePart]


class FlashBackend(AttentionBackend):
    """Attention by kernels that read keys in place."""

    block_multiple: ClassVar[int] = 256

    @classmethod
    def why_not(cls, geometry: Geometry) -> str | None:
        if geometry.device.type != "cuda":
            return f"it needs a CUDA device, and this is {geometry.device}"
        if geometry.dtype not in (torch.bfloat16, torch.float16):
            dtype = str(geometry.dtype).removeprefix("torch.")
            return f"it computes in bfloat16 and float16, not {dtype}"
        if geometry.head_dim % 8 or geometry.head_dim > MAX_HEAD_DIM:
            return f"head_dim {geometry.head_dim} is not a multiple of 8 up to {MAX_HEAD_DIM}"
        if geometry.has_int8_images:
            return "it cannot read images in int8"
        return why_too_old(geometry.device) or cls.why_not_importable()

    @classmethod
    @abstractmethod
    def why_not_importable(cls) -> str | None:
        """Why its kernels cannot be imported; None if they can."""

    @abstractmethod
    def attend_paged(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, call: PagedCall, scale: float
    ) -> Tensor:
        """The output of rows with a block table, [num_queries, num_heads, head_dim].

        query: the same shape; caches: [num_blocks, block_size, num_kv_heads, head_dim].
        """

    @abstractmethod
    def attend_ragged(
        self, query: Tensor, keys: Tensor, values: Tensor, call: RaggedCall, scale: float
    ) -> tuple[Tensor, Tensor]:
        """A call without a mask over consecutive keys; see `tiles.Kernel`."""

    def prepare(self, rows: PagedRows, device: torch.device, dtype: torch.dtype) -> FlashPlan:
        """A plan through the block table for causal rows, else tile by tile."""
        return _paged(rows, device) if rows.is_causal else plan_tiles(rows, device)

    def attend(
        self, query: Tensor, key_cache: States, value_cache: States, plan: FlashPlan, scale: float
    ) -> Tensor:
        assert isinstance(key_cache, Tensor), "see `why_not`"
        assert isinstance(value_cache, Tensor), "see `why_not`"
        if isinstance(plan, PagedCall):
            return self.attend_paged(query.contiguous(), key_cache, value_cache, plan, scale)
        return attend_tiles(query, key_cache, value_cache, plan, scale, self.attend_ragged)


def _paged(rows: PagedRows, device: torch.device) -> PagedCall:
    assert (rows.query_lens > 0).all(), "each row needs a query"
    assert (rows.query_lens <= rows.key_lens).all(), "a causal row's queries are its last keys"

    def put(array: NDArray[np.int64]) -> Tensor:
        return upload(array, device, np.int32)

    num_rows, table_width = rows.block_table.shape
    return PagedCall(
        query_starts=put(rows.query_start_loc),
        key_starts=put(np.concatenate([[0], np.cumsum(rows.key_lens)])),
        capacity_starts=put(np.arange(num_rows + 1) * table_width * rows.block_size),
        key_lens=put(rows.key_lens),
        block_table=put(rows.block_table),
        max_queries=int(rows.query_lens.max()),
        max_keys=int(rows.key_lens.max()),
        block_size=rows.block_size,
    )
