"""Triton kernels of paged attention: attend tiles of query rows to paged keys, merge pieces, write.

`triton_paged.py` launches them. Imported only if triton is installed. With TRITON_INTERPRET=1 set
before the import they run on a CPU, slowly, for tests.

A program of `attend_kernel` computes one work item of one KV head (`work_items.py`):

    M query rows  = up to BLOCK_Q consecutive queries of one row x the GROUP heads of a KV head
    keys          = a piece of what they may see, BLOCK_N at a time

Softmax runs online in float32 and in base 2 (Dao et al., 2022); pieces are merged by their
log-sum-exp (FlashDecoding). Products take operands of the cache's type, float32 in full precision.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_kernel(
    query,
    key_cache,
    value_cache,
    key_scales,
    value_scales,
    output,
    partial,
    partial_lse,
    item_rows,
    item_offsets,
    item_pieces,
    sizes,
    query_starts,
    key_lens,
    block_table,
    query_stride,
    scale_log2,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_CUT: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    IS_INT8: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Attend one tile of queries to one piece of its row's keys.

    query: [num_queries, num_heads, head_dim], query_stride elements from token to token; caches:
    one layer's, [num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM]; scales: of the caches' tokens if
    IS_INT8, [num_blocks, BLOCK_SIZE, NUM_KV_HEADS], else any tensor; output: as query, contiguous.
    item_rows, item_offsets, item_pieces: int32 [num_items], the item's row, negative for no item,
    its first query within the row, 0 if BLOCK_Q is 1, and its piece. sizes: int32 [2], keys of a
    piece and ids of a row of the table. query_starts, key_lens, block_table: the rows', int32.
    IS_CUT: some tile has several pieces; their results go to partial, float32 [num_items, BLOCK_Q,
    num_heads, head_dim], and partial_lse, base 2, [num_items, BLOCK_Q, num_heads]. OPERAND: the
    type in which products are fed.
    """
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    num_heads: tl.constexpr = NUM_KV_HEADS * GROUP
    row = tl.load(item_rows + item)
    if row < 0:
        return
    offset = 0
    if BLOCK_Q > 1:
        offset = tl.load(item_offsets + item)
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
    first = 0
    end = num_seen
    if IS_CUT:
        piece_size = tl.load(sizes)
        first = tl.load(item_pieces + item) * piece_size
        end = tl.minimum(first + piece_size, num_seen)

    highest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    mixed = tl.zeros([M, PADDED_DIM], tl.float32)
    # The next block ids are loaded a round early: with that load in the way of the keys' own the
    # compiler could not load keys and values ahead.
    table = block_table + row.to(tl.int64) * tl.load(sizes + 1)
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
        scale_at = slot * NUM_KV_HEADS + kv_head
        if IS_INT8:
            key_scale = tl.load(key_scales + scale_at, mask=is_key, other=0.0)
            scores = scores * key_scale.to(tl.float32)[None, :]
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
        if IS_INT8:
            value_scale = tl.load(value_scales + scale_at, mask=is_key, other=0.0)
            weights = weights * value_scale.to(tl.float32)[None, :]
        v = tl.load(value_cache + key_at, mask=is_loaded, other=0.0).to(OPERAND)
        mixed = mixed * kept[:, None]
        mixed += tl.dot(weights.to(OPERAND), v, input_precision="ieee")
        highest = higher
        ahead = key + BLOCK_N
        block = tl.load(table + ahead // BLOCK_SIZE, mask=ahead < end, other=0)

    sees_any = total > 0.0
    mixed = mixed / tl.where(sees_any, total, 1.0)[:, None]
    out_row = token * num_heads + head
    out_at = output + out_row[:, None] * HEAD_DIM + dims[None, :]
    is_whole = True
    if IS_CUT:
        is_whole = num_seen <= piece_size
    if is_whole:
        tl.store(out_at, mixed.to(output.dtype.element_ty), mask=is_element)
    else:
        part = (item.to(tl.int64) * BLOCK_Q + member // GROUP) * num_heads + head
        tl.store(partial + part[:, None] * HEAD_DIM + dims[None, :], mixed, mask=is_element)
        lse = tl.where(sees_any, highest + tl.log2(tl.where(sees_any, total, 1.0)), float("-inf"))
        tl.store(partial_lse + part, lse, mask=is_query)


@triton.jit
def merge_kernel(
    partial,
    partial_lse,
    output,
    split,
    item_rows,
    item_offsets,
    sizes,
    query_starts,
    key_lens,
    num_heads,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """One head's output of one query of a tile with several pieces; zeros if none saw a key.

    split: int32, the tiles' first items, negative for no tile. A program a query of a tile and
    head; it reads AT_ONCE pieces at a time.
    """
    first = tl.load(split + tl.program_id(0) // BLOCK_Q)
    if first < 0:
        return
    inside = tl.program_id(0) % BLOCK_Q
    head = tl.program_id(1)
    row = tl.load(item_rows + first)
    offset = 0
    if BLOCK_Q > 1:
        offset = tl.load(item_offsets + first)
    begin = tl.load(query_starts + row)
    query_len = tl.load(query_starts + row + 1) - begin
    num_seen = tl.load(key_lens + row)
    if IS_CAUSAL:
        num_seen = tl.minimum(num_seen, num_seen - query_len + offset + BLOCK_Q)
    # nothing was written for queries that the tile does not have
    is_query = offset + inside < query_len
    num_pieces = tl.where(is_query, tl.cdiv(num_seen, tl.load(sizes)), 0)
    dims = tl.arange(0, PADDED_DIM)
    is_dim = dims < HEAD_DIM

    highest = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    mixed = tl.zeros([PADDED_DIM], tl.float32)
    for start in range(0, num_pieces, AT_ONCE):
        piece = start + tl.arange(0, AT_ONCE)
        is_piece = piece < num_pieces
        at = ((first + piece).to(tl.int64) * BLOCK_Q + inside) * num_heads + head
        lse = tl.load(partial_lse + at, mask=is_piece, other=float("-inf"))
        mask = is_piece[:, None] & is_dim[None, :]
        parts = tl.load(partial + at[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        higher = tl.maximum(highest, tl.max(lse, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(lse - base)
        kept = tl.exp2(highest - base)
        total = total * kept + tl.sum(weights, 0)
        mixed = mixed * kept + tl.sum(parts * weights[:, None], 0)
        highest = higher
    merged = mixed / tl.where(total > 0.0, total, 1.0)
    out_row = (begin + offset + inside).to(tl.int64) * num_heads + head
    if is_query:
        rounded = merged.to(output.dtype.element_ty)
        tl.store(output + out_row * HEAD_DIM + dims, rounded, mask=is_dim)


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
