"""The backend of large models on a CPU: decodes read blocks in place, by this project's C.

Rows of a few queries are computed query by query (`kernels/paged_attention.py`), without a copy of
their keys. Longer rows, such as prompts, are left to SDPA.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels import c_library, paged_attention
from ..kernels.paged_attention import PagedQueries
from .base import AttentionBackend, Geometry, PagedRows
from .int8_states import Int8States, States
from .sdpa import Bucket, SdpaBackend

# The longest rows whose queries are computed one by one: of text, and over images, whose many keys
# SDPA reads once for all queries of a row.
MAX_TEXT_QUERIES, MAX_IMAGE_QUERIES = 8, 3


@dataclass(slots=True, frozen=True)
class CpuPlan:
    """The queries that read blocks in place, if any, and the buckets of the other rows."""

    queries: PagedQueries | None
    buckets: list[Bucket]


class CpuBackend(AttentionBackend):
    """Attention of few queries a row over blocks in place; of many by gathering keys, and SDPA."""

    name: ClassVar[str] = "cpu"
    _longer: ClassVar[SdpaBackend] = SdpaBackend()

    @classmethod
    def why_not(cls, geometry: Geometry) -> str | None:
        if geometry.device.type != "cpu":
            return f"it needs a CPU, and this is {geometry.device.type}"
        if not c_library.is_allowed():
            return "--cpu-products is torch"
        if not c_library.is_worth_it(hidden := geometry.num_heads * geometry.head_dim):
            return f"a hidden size of {hidden} is below {c_library.MIN_HIDDEN}"
        if not paged_attention.fits(geometry.dtype, geometry.head_dim):
            return "it needs gcc, float32 or bfloat16, and heads of 32, 64, ... numbers"
        return None

    def prepare(self, rows: PagedRows, device: torch.device, dtype: torch.dtype) -> CpuPlan:
        """The plan of these rows; see `AttentionBackend.prepare`."""
        most = MAX_TEXT_QUERIES if rows.is_causal else MAX_IMAGE_QUERIES
        is_short = (rows.query_lens <= most) & (rows.key_lens > 0)
        others = replace(rows, key_lens=np.where(is_short, 0, rows.key_lens))
        buckets = self._longer.prepare(others, device, dtype)
        return CpuPlan(_queries(rows, is_short) if is_short.any() else None, buckets)

    def attend(
        self, query: Tensor, key_cache: States, value_cache: States, plan: CpuPlan, scale: float
    ) -> Tensor:
        """The attention output; see `AttentionBackend.attend`."""
        query = query.contiguous()
        output = self._longer.attend(query, key_cache, value_cache, plan.buckets, scale)
        if plan.queries is not None:
            keys, values = _tensor(key_cache), _tensor(value_cache)
            scales = None
            if isinstance(key_cache, Int8States) and isinstance(value_cache, Int8States):
                scales = key_cache.scales, value_cache.scales
            paged_attention.attend(query, keys, values, scales, plan.queries, scale, output)
        return output


def _tensor(states: States) -> Tensor:
    return states.codes if isinstance(states, Int8States) else states


def _queries(rows: PagedRows, is_short: NDArray[np.bool_]) -> PagedQueries:
    """Each query of the short rows with the keys that it sees."""
    tables = np.repeat(np.flatnonzero(is_short), rows.query_lens[is_short])
    is_taken = np.repeat(is_short, rows.query_lens)
    positions = np.flatnonzero(is_taken)
    key_lens = rows.key_lens[tables]
    if rows.is_causal:
        key_lens = key_lens - (rows.query_start_loc[tables + 1] - 1 - positions)

    def copy(numbers: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(numbers))

    return PagedQueries(
        copy(positions), copy(key_lens), copy(tables), copy(rows.block_table), rows.block_size
    )
