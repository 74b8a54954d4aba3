"""The interface of attention backends: write keys and values to slots, attend rows to paged keys.

Also describes a step's rows. The layout of one layer's keys and values, as flash_attn reads it:

    [num_blocks, block_size, num_kv_heads, head_dim]
    slot = block_id * block_size + offset
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .int8_states import States, write_states


@dataclass(slots=True, frozen=True)
class Geometry:
    """The device, dtype and sizes that decide whether a backend can run.

    num_patches: tokens of an image block; head counts are of the text model. has_int8_images: the
    image pool has `Int8States`.
    """

    device: torch.device
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_patches: int
    has_int8_images: bool = False


@dataclass(slots=True, frozen=True)
class PagedRows:
    """The rows of one step on one pool; a row is consecutive queries over the same keys.

    query_start_loc: int64 [num_rows + 1], the packed queries of row i are
    query_start_loc[i] : query_start_loc[i + 1]. key_lens: int64 [num_rows], 0 for a row that sees
    nothing. block_table: int64 [num_rows, max blocks], padded with 0; row i's key j is in block
    block_table[i, j // block_size]. is_causal: the row's queries are its last keys and see no later
    key; otherwise each query sees all keys of its row, which are whole blocks. All arrays are on
    the host, so that a backend plans without waiting for the device.
    """

    query_start_loc: NDArray[np.int64]
    key_lens: NDArray[np.int64]
    block_table: NDArray[np.int64]
    block_size: int
    is_causal: bool

    @property
    def query_lens(self) -> NDArray[np.int64]:
        return np.diff(self.query_start_loc)

    @property
    def num_queries(self) -> int:
        return int(self.query_start_loc[-1])


@dataclass(slots=True, frozen=True)
class PlanLists:
    """A plan that lacks its lists on the device, so that a step copies those of all its plans once.

    arrays: the lists, on the host. plan: makes the plan of their copies, in that order.
    """

    arrays: list[NDArray[Any]]
    plan: Callable[[Sequence[Tensor]], Any]


class AttentionBackend(ABC):
    """Attention over paged keys and values. Keeps no state between steps.

    A step calls `lists` once for each pool and then, layer by layer, `write` and `attend`.
    """

    name: ClassVar[str]
    # --block-size must be a multiple of it
    block_multiple: ClassVar[int] = 1

    @classmethod
    def why_not(cls, geometry: Geometry) -> str | None:
        """Why it cannot run with this geometry, in a few words; None if it can."""
        return None

    def sized_for(self, geometry: Geometry) -> AttentionBackend:
        """The backend for a model's sizes; by default itself."""
        return self

    @abstractmethod
    def prepare(self, rows: PagedRows, device: torch.device, dtype: torch.dtype) -> Any:
        """A plan for these rows, shared by all layers of the step; opaque to the caller."""

    def lists(self, rows: PagedRows, device: torch.device, dtype: torch.dtype) -> PlanLists:
        """The same plan before its copy; by default `prepare` has copied it already."""
        plan = self.prepare(rows, device, dtype)
        return PlanLists([], lambda copies: plan)

    @abstractmethod
    def attend(
        self, query: Tensor, key_cache: States, value_cache: States, plan: Any, scale: float
    ) -> Tensor:
        """The attention output of the plan's rows, [num_queries, num_heads, head_dim].

        query: [num_queries, num_heads, head_dim]; caches: one layer's, in the module's layout.
        A row without keys gives zeros. No slot outside a row's keys is read.
        """

    def write(
        self, keys: Tensor, values: Tensor, key_cache: States, value_cache: States, slots: Tensor
    ) -> None:
        """Store this step's keys and values in their slots.

        keys, values: [num_tokens, num_kv_heads, head_dim]; slots: [num_tokens] int64.
        Layout: PagedAttention (Kwon et al., 2023), section 4.1.
        """
        write_states(keys, key_cache, slots)
        write_states(values, value_cache, slots)
