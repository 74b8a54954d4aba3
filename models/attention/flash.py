"""What the flash-attention backends share: their plans, and what their kernels refuse.

Owns the arguments of the calls as tensors on the device. Knows nothing of any package: a backend
hands its kernels in. Text is read through block tables, images tile by tile (`tiles.py`).

Facts of FlashAttention 2's paged kernels, the package's and torch's alike: half precision, compute
capability 8.0, head_dim a multiple of 8 up to 256, blocks in multiples of 256 tokens, causal masks
aligned to the last key.
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
from .base import AttentionBackend, Geometry, PagedRows
from .tiles import RaggedCall, TilePart, attend_tiles, plan_tiles

MIN_CAPABILITY = (8, 0)
MAX_HEAD_DIM = 256


@dataclass(slots=True, frozen=True)
class PagedCall:
    """Rows over a pool's blocks: row i's queries are the last tokens of its keys.

    query_starts, key_starts, capacity_starts: int32 [num_rows + 1], cumulative counts of queries,
    of keys and of the table's slots; key_lens: int32 [num_rows]; block_table: int32
    [num_rows, max blocks]. max_queries, max_keys: the longest row's. block_size: tokens of a block.
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
        """A last token alone sees every key; kernels are faster where no mask is asked for."""
        return self.max_queries > 1


FlashPlan = PagedCall | list[TilePart]


class FlashBackend(AttentionBackend):
    """Attention by kernels that read keys where they lie."""

    block_multiple: ClassVar[int] = 256

    @classmethod
    def why_not(cls, geometry: Geometry) -> str | None:
        """See `AttentionBackend.why_not`."""
        if geometry.device.type != "cuda":
            return f"it needs a CUDA device, and this is {geometry.device}"
        if geometry.dtype not in (torch.bfloat16, torch.float16):
            dtype = str(geometry.dtype).removeprefix("torch.")
            return f"it computes in bfloat16 and float16, not in {dtype}"
        if geometry.head_dim % 8 or geometry.head_dim > MAX_HEAD_DIM:
            return f"heads of {geometry.head_dim} are no multiple of 8 up to {MAX_HEAD_DIM}"
        capability = torch.cuda.get_device_capability(geometry.device)
        if capability < MIN_CAPABILITY:
            return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
        return cls.why_not_importable()

    @classmethod
    @abstractmethod
    def why_not_importable(cls) -> str | None:
        """What its kernels' package lacks; None where they are there."""

    @abstractmethod
    def attend_paged(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, call: PagedCall, scale: float
    ) -> Tensor:
        """The output of rows behind a block table, [num_queries, num_heads, head_dim].

        query: the same shape; caches: [num_blocks, block_size, num_kv_heads, head_dim].
        """

    @abstractmethod
    def attend_ragged(
        self, query: Tensor, keys: Tensor, values: Tensor, call: RaggedCall, scale: float
    ) -> tuple[Tensor, Tensor]:
        """A call without a mask over consecutive keys; see `tiles.Kernel`."""

    def prepare(self, rows: PagedRows, device: torch.device, dtype: torch.dtype) -> FlashPlan:
        """A causal plan through the block table, any other tile by tile."""
        return _paged(rows, device) if rows.is_causal else plan_tiles(rows, device)

    def attend(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, plan: FlashPlan, scale: float
    ) -> Tensor:
        """See `AttentionBackend.attend`."""
        if isinstance(plan, PagedCall):
            return self.attend_paged(query.contiguous(), key_cache, value_cache, plan, scale)
        return attend_tiles(query, key_cache, value_cache, plan, scale, self.attend_ragged)


def _paged(rows: PagedRows, device: torch.device) -> PagedCall:
    assert (rows.query_lens > 0).all(), "a row without queries has nothing to ask"
    assert (rows.query_lens <= rows.key_lens).all(), "a causal row's queries are among its keys"

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
