"""Attention of packed queries to whole image blocks in place, without copies or padding.

An image block has num_patches tokens (1,601 for the 11B), which no kernel accepts as a block size.
But a layer's pool is also one long row of keys, and a tile is a part of it. So a call's "sequence"
is a tile, and its queries are all queries of the step that see the tile:

    pool      | gap      | tile 3 | tile 4 | gap    | tile 9 |      keys, in place
    queries   |          | a b    | a      |        | b c    |      sorted by tile

A gap is a sequence without queries. An image that several requests use is read once. A query's
results from its tiles are merged by the log-sum-exp of the scores, as splits are in FlashDecoding.
The query heads of a KV group become query rows of their KV head, so a key is read once a group;
this is exact because nothing here is causal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..device_copies import upload
from .base import PagedRows

Ints = NDArray[np.int64]

# most pairs of a query and a tile in a call: 64 MiB of outputs of the 11B in bf16
MAX_PAIRS = 8_192


@dataclass(slots=True, frozen=True)
class RaggedCall:
    """One call over sequences of consecutive queries and consecutive keys.

    query_starts, key_starts: int32 [num_sequences + 1], in query rows and in slots of the pool.
    max_queries, max_keys: of the longest sequence.
    """

    query_starts: Tensor
    key_starts: Tensor
    max_queries: int
    max_keys: int

    def times(self, group: int) -> RaggedCall:
        """The call with each query row repeated `group` times."""
        return replace(
            self, query_starts=self.query_starts * group, max_queries=self.max_queries * group
        )


@dataclass(slots=True, frozen=True)
class TilePart:
    """Some of a step's queries and all the tiles that they see.

    seeing: int64 [n], positions of the part's queries in the packed queries. pairs: int64
    [num_pairs], the packed query of each pair, sorted by tile. merge: int64 [n, most tiles], the
    pairs of each query, padded with 0. is_padding: bool of that shape; None without padding.
    """

    seeing: Tensor
    pairs: Tensor
    merge: Tensor
    is_padding: Tensor | None
    call: RaggedCall


# query [rows, num_kv_heads, head_dim], keys and values [slots, num_kv_heads, head_dim], scale
# -> output [rows, num_kv_heads, head_dim] and log-sum-exp of the scaled scores [num_kv_heads, rows]
Kernel = Callable[[Tensor, Tensor, Tensor, RaggedCall, float], tuple[Tensor, Tensor]]


def plan_tiles(rows: PagedRows, device: torch.device) -> list[TilePart]:
    """The calls of rows that are not causal; empty if no query sees a key."""
    assert not rows.is_causal, "tiles have no order"
    assert (rows.key_lens % rows.block_size == 0).all(), "rows see whole image blocks"
    row_of_query = np.repeat(np.arange(len(rows.key_lens)), rows.query_lens)
    num_tiles = (rows.key_lens // rows.block_size)[row_of_query]
    seeing = np.flatnonzero(num_tiles)
    return [
        _part(rows, part, row_of_query[part], num_tiles[part], device)
        for part in _bounded(seeing, num_tiles[seeing])
    ]


def _bounded(queries: Ints, num_tiles: Ints) -> Iterator[Ints]:
    """The queries in pieces of about MAX_PAIRS pairs, one query at least."""
    piece = (np.cumsum(num_tiles) - num_tiles) // MAX_PAIRS
    for index in np.unique(piece):
        yield queries[piece == index]


def _part(
    rows: PagedRows, queries: Ints, row_of_query: Ints, num_tiles: Ints, device: torch.device
) -> TilePart:
    is_pair = np.arange(num_tiles.max()) < num_tiles[:, None]
    blocks = rows.block_table[row_of_query, : is_pair.shape[1]][is_pair]
    order = np.argsort(blocks, kind="stable")
    merge = np.zeros(is_pair.shape, dtype=np.int64)
    merge[is_pair] = np.argsort(order)

    def put(array: NDArray[np.int64] | NDArray[np.bool_]) -> Tensor:
        return upload(array, device)

    return TilePart(
        seeing=put(queries),
        pairs=put(np.repeat(queries, num_tiles)[order]),
        merge=put(merge),
        is_padding=None if is_pair.all() else put(~is_pair),
        call=_call(blocks, rows.block_size, device),
    )


def _call(blocks: Ints, block_size: int, device: torch.device) -> RaggedCall:
    """Tiles and the gaps between them, in the pool's order; `blocks` are the pairs' tiles."""
    tiles, counts = np.unique(blocks, return_counts=True)
    starts = tiles * block_size
    key_starts = np.unique(np.concatenate([[0], starts, starts + block_size]))
    num_queries = np.zeros(len(key_starts) - 1, dtype=np.int64)
    num_queries[np.searchsorted(key_starts, starts)] = counts
    query_starts = np.concatenate([[0], np.cumsum(num_queries)])
    return RaggedCall(
        query_starts=upload(query_starts, device, np.int32),
        key_starts=upload(key_starts, device, np.int32),
        max_queries=int(num_queries.max()),
        max_keys=int(np.diff(key_starts).max()),
    )


def attend_tiles(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    parts: list[TilePart],
    scale: float,
    kernel: Kernel,
) -> Tensor:
    """The attention output, [num_queries, num_heads, head_dim]; zeros for queries without a tile.

    query: the same shape; caches: one layer's image pool, [blocks, num_patches, heads, head_dim].
    """
    if len(parts) == 1 and len(parts[0].seeing) == len(query):
        return _attend_part(query, key_cache, value_cache, parts[0], scale, kernel)
    output = torch.zeros_like(query, memory_format=torch.contiguous_format)
    for part in parts:
        merged = _attend_part(query, key_cache, value_cache, part, scale, kernel)
        output.index_copy_(0, part.seeing, merged)
    return output


def _attend_part(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    part: TilePart,
    scale: float,
    kernel: Kernel,
) -> Tensor:
    """The output of the part's queries, [n, num_heads, head_dim]."""
    num_kv_heads, head_dim = key_cache.shape[-2:]
    num_heads, group = query.shape[1], query.shape[1] // num_kv_heads
    # [pairs, group, num_kv_heads, head_dim]
    by_member = query[part.pairs].unflatten(1, (num_kv_heads, group)).transpose(1, 2)
    partial, lse = kernel(
        by_member.reshape(-1, num_kv_heads, head_dim),
        key_cache.view(-1, num_kv_heads, head_dim),
        value_cache.view(-1, num_kv_heads, head_dim),
        part.call.times(group),
        scale,
    )
    partial = partial.view(-1, group, num_kv_heads, head_dim)
    lse = lse.view(num_kv_heads, -1, group).permute(1, 2, 0)
    merged = _merge(partial, lse, part).transpose(1, 2)
    return merged.reshape(-1, num_heads, head_dim)


def _merge(partial: Tensor, lse: Tensor, part: TilePart) -> Tensor:
    """Merge the pairs' outputs: one for each query, [n, group, num_kv_heads, head_dim]."""
    if part.merge.shape[1] == 1:
        return partial[part.merge[:, 0]]
    weights = lse[part.merge]
    if part.is_padding is not None:
        weights = weights.masked_fill(part.is_padding[:, :, None, None], float("-inf"))
    weights = weights.float().softmax(1)[..., None]
    return (weights * partial[part.merge]).sum(1).to(partial.dtype)
