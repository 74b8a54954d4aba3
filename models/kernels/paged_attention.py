"""Attention of single queries to paged keys on a CPU by this project's C, where they lie.

torch's attention needs the keys of each row side by side: a copy of all keys in every layer and
step. In C a step's decodes are one call, which reads each block where it is.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import c_library
from .c_library import FLOAT, NUMBER, POINTER, SIZE

SOURCE = Path(__file__).with_name("paged_attention.c")
# the order of the C file's kinds
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


@dataclass(slots=True, frozen=True)
class PagedQueries:
    """Single queries, each with the keys that it sees; all int64 on the host.

    rows: [n], their positions in the packed queries. key_lens: [n], at least 1. tables: [n], each
    query's row of `table`, [rows, blocks], which names the blocks of its keys in order.
    """

    rows: Tensor
    key_lens: Tensor
    tables: Tensor
    table: Tensor
    block_size: int


def fits(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the C is there, and takes numbers of this type and heads of this size."""
    if dtype not in (torch.float32, torch.bfloat16) or (library := _library()) is None:
        return False
    is_whole = head_dim % library.paged_attention_multiple() == 0
    return is_whole and head_dim <= library.paged_attention_most()


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    queries: PagedQueries,
    scale: float,
    result: Tensor,
) -> None:
    """Write the attention output of these queries to their rows of `result`.

    query, result: [num_queries, num_heads, head_dim], contiguous. keys, values: one layer's cache,
    [blocks, block_size, num_kv_heads, head_dim], of the queries' type, or int8 with `scales` of
    keys and values, bfloat16 [blocks, block_size, num_kv_heads].
    """
    library = _library()
    assert library is not None, "ask fits() first"
    num_kv_heads, head_dim = keys.shape[-2:]
    key_scales, value_scales = (each.data_ptr() for each in scales) if scales else (None, None)
    library.paged_attention(
        _KINDS[query.dtype],
        _KINDS[keys.dtype],
        len(queries.rows),
        query.shape[1],
        num_kv_heads,
        head_dim,
        queries.block_size,
        scale,
        query.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        key_scales,
        value_scales,
        queries.rows.data_ptr(),
        queries.key_lens.data_ptr(),
        queries.tables.data_ptr(),
        queries.table.data_ptr(),
        queries.table.stride(0),
        result.data_ptr(),
        torch.get_num_threads(),
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    head = [NUMBER, NUMBER, *[SIZE] * 5, FLOAT]
    library = c_library.load(SOURCE, paged_attention=[*head, *[POINTER] * 9, SIZE, POINTER, NUMBER])
    if library is not None:
        library.paged_attention_multiple.restype = SIZE
        library.paged_attention_most.restype = SIZE
    return library
