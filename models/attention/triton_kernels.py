"""Triton kernels of paged attention: attend tiles of query rows to paged keys, merge splits, write.

`triton_paged.py` launches them. Imported only if triton is installed. With TRITON_INTERPRET=1 set
before the import they run on a CPU, slowly, for tests.

A program of `attend_kernel` computes one tile of queries, one KV head and one split of the keys:

    M query rows  = up to BLOCK_Q consecutive queries of one row x the GROUP heads of a KV head
    keys          = split s of num_splits equal pieces of what the tile may see, BLOCK_N at a time

Softmax runs online in float32 and in base 2 (Dao et al., 2022); splits are merged by their
log-sum-exp (FlashDecoding). Products take operands of the cache's type, float32 in full precision.
"""

from __future__ import annotations

import triton
import triton.language as tl


# counts that change from step to step compile no kernel anew
@triton.jit(do_not_specialize=["table_stride"])
def attend_kernel(
    query,
    key_cache,
    value_cache,
    output,
    partial,
    partial_lse,
    tile_rows,
    tile_offsets,
    query_starts,
    key_lens,
    block_table,
    query_stride,
    table_stride,
    scale_log2,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Attend one tile of queries to one split of its row's keys.

    query: [num_queries, num_heads, head_dim], query_stride elements from token to token; caches:
    one layer's, [num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM]; output: as query, contiguous.
    partial: float32 [NUM_SPLITS, num_tiles, num_heads, head_dim] and partial_lse, base 2,
    [NUM_SPLITS, num_tiles, num_heads], written where NUM_SPLITS > 1, whose tiles have one query
    each: their size is that of the launch, not of the step. tile_rows, tile_offsets:
    int32 [num_tiles], the tile's row and its first query within the row. query_starts, key_lens,
    block_table: the rows', int32. OPERAND: the type in which products are fed.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    num_heads: tl.constexpr = NUM_KV_HEADS * GROUP
    row = tl.load(tile_rows + tile)
    offset = tl.load(tile_offsets + tile)
    begin = tl.load(query_starts + row)
    query_len = tl.load(query_starts + row + 1) - begin
    key_len = tl.load(key_lens + row)

    member = tl.arange(0, M)
    place = offset + member // GROUP
    head = kv_head * GROUP + member % GROUP
    is_query = (member < BLOCK_Q * GROUP) & (place < query_len)
    dims = tl.arange(0, PADDED_DIM)
    is_dim = dims < HEAD_DIM
    token = (begin + place).to(tl.int64)
    at = token[:, None] * query_stride + head[:, None] * HEAD_DIM + dims[None, :]
    is_element = is_query[:, None] & is_dim[None, :]
    q = tl.load(query + at, mask=is_element, other=0.0).to(OPERAND)

    # a causal row's queries are its last keys: query i sees keys up to key_len - query_len + i
    last_seen = key_len - query_len + place
    num_seen = key_len
    if IS_CAUSAL:
        num_seen = tl.minimum(key_len, key_len - query_len + offset + BLOCK_Q)
    per_split = tl.cdiv(tl.cdiv(num_seen, NUM_SPLITS), BLOCK_N) * BLOCK_N
    first = split * per_split
    end = tl.minimum(first + per_split, num_seen)

    highest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    mixed = tl.zeros([M, PADDED_DIM], tl.float32)
    # The next block ids are loaded a round early: with that load in the way of the keys' own the
    # compiler could not load keys and values ahead.
    table = block_table + row.to(tl.int64) * table_stride
    ahead = first + tl.arange(0, BLOCK_N)
    block = tl.load(table + ahead // BLOCK_SIZE, mask=ahead < end, other=0)
    for start in range(first, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        is_key = key < end
        slot = block.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE
        key_at = (slot[:, None] * NUM_KV_HEADS + kv_head) * HEAD_DIM + dims[None, :]
        is_loaded = is_key[:, None] & is_dim[None, :]
        k = tl.load(key_cache + key_at, mask=is_loaded, other=0.0).to(OPERAND)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        is_seen = is_key[None, :]
        if IS_CAUSAL:
            is_seen = is_seen & (key[None, :] <= last_seen[:, None])
        scores = tl.where(is_seen, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        # a query row that has seen nothing yet has no finite highest score
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        kept = tl.exp2(highest - base)
        total = total * kept + tl.sum(weights, 1)
        v = tl.load(value_cache + key_at, mask=is_loaded, other=0.0).to(OPERAND)
        mixed = mixed * kept[:, None]
        mixed += tl.dot(weights.to(OPERAND), v, input_precision="ieee")
        highest = higher
        ahead = key + BLOCK_N
        block = tl.load(table + ahead // BLOCK_SIZE, mask=ahead < end, other=0)

    sees_any = total > 0.0
    mixed = mixed / tl.where(sees_any, total, 1.0)[:, None]
    if NUM_SPLITS == 1:
        out_row = token * num_heads + head
        out_at = output + out_row[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out_at, mixed.to(output.dtype.element_ty), mask=is_element)
    else:
        tl.static_assert(BLOCK_Q == 1)
        part = (split.to(tl.int64) * tl.num_programs(0) + tile) * num_heads + head
        tl.store(partial + part[:, None] * HEAD_DIM + dims[None, :], mixed, mask=is_element)
        lse = tl.where(sees_any, highest + tl.log2(tl.where(sees_any, total, 1.0)), float("-inf"))
        tl.store(partial_lse + part, lse, mask=is_query)


@triton.jit
def merge_kernel(
    partial,
    partial_lse,
    output,
    tile_rows,
    query_starts,
    num_heads,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
):
    """One head's output of a row with one query, from one a split; zeros if no split saw a key."""
    tile, head = tl.program_id(0), tl.program_id(1)
    token = tl.load(query_starts + tl.load(tile_rows + tile))
    row = token.to(tl.int64) * num_heads + head
    splits = tl.arange(0, PADDED_SPLITS)
    dims = tl.arange(0, PADDED_DIM)
    is_split = splits < NUM_SPLITS
    at = (splits.to(tl.int64) * tl.num_programs(0) + tile) * num_heads + head
    lse = tl.load(partial_lse + at, mask=is_split, other=float("-inf"))
    highest = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(weights, 0)
    mask = is_split[:, None] & (dims < HEAD_DIM)[None, :]
    parts = tl.load(partial + at[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
    merged = tl.sum(parts * weights[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(
        output + row * HEAD_DIM + dims, merged.to(output.dtype.element_ty), mask=dims < HEAD_DIM
    )


@triton.jit
def write_kernel(
    keys,
    values,
    key_cache,
    value_cache,
    slots,
    key_stride,
    value_stride,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
):
    """Store one token's keys and values, [width] each, in its slot; a negative slot is skipped."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        place = tl.arange(0, PADDED_WIDTH)
        mask = place < WIDTH
        key = tl.load(keys + token * key_stride + place, mask=mask)
        value = tl.load(values + token * value_stride + place, mask=mask)
        tl.store(key_cache + slot * WIDTH + place, key, mask=mask)
        tl.store(value_cache + slot * WIDTH + place, value, mask=mask)
