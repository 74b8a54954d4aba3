"""The Triton kernels of several adapters' low-rank products; `kernel_rows.py` launches them.

Imported only if triton is installed. Rows are sorted by slot: `order` has the row of each place,
`starts` the first place of each slot. A program computes BLOCK_M places of one slot; the grid has
all slots, and programs without rows or ranks stop at once, so that a grid depends on the number of
rows alone. The first kernel multiplies with A, over a part of the inputs; the second adds the parts
up, multiplies with B and adds to the product. B is block-diagonal: the second reads only the ranks
of its columns' layers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def low_rank_kernel(
    states,
    a,
    low,
    order,
    starts,
    ends,
    num_rows,
    state_stride,
    per_split,
    IN: tl.constexpr,
    RANKS: tl.constexpr,
    NUM_ENDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK_TILES: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """states [rows, IN] x a [slots, RANKS, IN] -> low float32 [splits, num_rows, RANKS], by place.

    ends: [slots, NUM_ENDS], the last is a slot's number of ranks. per_split: inputs of a split, a
    multiple of BLOCK_K. num_rows: rows with an adapter.
    """
    slot = tl.program_id(2).to(tl.int64)
    rank = (tl.program_id(1) % RANK_TILES) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1) // RANK_TILES
    num_ranks = tl.load(ends + slot * NUM_ENDS + NUM_ENDS - 1)
    first = tl.load(starts + slot) + tl.program_id(0) * BLOCK_M
    last = tl.load(starts + slot + 1)
    if (first < last) & ((tl.program_id(1) % RANK_TILES) * BLOCK_R < num_ranks):
        place = first + tl.arange(0, BLOCK_M)
        is_row = place < last
        is_rank = rank < num_ranks
        row = tl.load(order + place, mask=is_row, other=0).to(tl.int64)
        inner = split * per_split + tl.arange(0, BLOCK_K)
        state_at = states + row[:, None] * state_stride
        a_at = a + (slot * RANKS + rank)[:, None] * IN
        sums = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for step in range(0, per_split, BLOCK_K):
            index = inner + step
            is_in = index < IN
            x = tl.load(state_at + index[None, :], mask=is_row[:, None] & is_in[None, :], other=0.0)
            w = tl.load(a_at + index[None, :], mask=is_rank[:, None] & is_in[None, :], other=0.0)
            sums += tl.dot(x.to(OPERAND), tl.trans(w.to(OPERAND)), input_precision="ieee")
        at = (split.to(tl.int64) * num_rows + place[:, None]) * RANKS + rank[None, :]
        tl.store(low + at, sums, mask=is_row[:, None] & is_rank[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def add_change_kernel(
    low,
    b,
    result,
    order,
    starts,
    ends,
    num_rows,
    result_stride,
    OUT: tl.constexpr,
    RANKS: tl.constexpr,
    NUM_ENDS: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """result [rows, OUT] += the sum of low's parts x b [slots, RANKS, OUT].

    SECOND, THIRD: the first outputs of a site's second and third layer; OUT if there is none.
    """
    slot = tl.program_id(2).to(tl.int64)
    begin = tl.program_id(1) * BLOCK_N
    first = tl.load(starts + slot) + tl.program_id(0) * BLOCK_M
    last = tl.load(starts + slot + 1)
    # the layers of the first and the last column
    final = tl.minimum(begin + BLOCK_N, OUT) - 1
    low_part = (begin >= SECOND).to(tl.int32) + (begin >= THIRD).to(tl.int32)
    high_part = (final >= SECOND).to(tl.int32) + (final >= THIRD).to(tl.int32)
    from_rank = tl.load(ends + slot * NUM_ENDS + low_part)
    to_rank = tl.load(ends + slot * NUM_ENDS + high_part + 1)
    if (first < last) & (from_rank < to_rank):
        place = first + tl.arange(0, BLOCK_M)
        is_row = place < last
        column = begin + tl.arange(0, BLOCK_N)
        is_column = column < OUT
        row = tl.load(order + place, mask=is_row, other=0).to(tl.int64)
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(from_rank, to_rank, BLOCK_R):
            rank = start + tl.arange(0, BLOCK_R)
            is_rank = rank < to_rank
            mask = is_row[:, None] & is_rank[None, :]
            total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
            for split in tl.static_range(SPLITS):
                at = (split * num_rows + place[:, None]).to(tl.int64) * RANKS + rank[None, :]
                total += tl.load(low + at, mask=mask, other=0.0)
            w_at = b + (slot * RANKS + rank)[:, None] * OUT + column[None, :]
            w = tl.load(w_at, mask=is_rank[:, None] & is_column[None, :], other=0.0)
            sums += tl.dot(total.to(OPERAND), w.to(OPERAND), input_precision="ieee")
        at = result + row[:, None] * result_stride + column[None, :]
        mask = is_row[:, None] & is_column[None, :]
        before = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        tl.store(at, (before + sums).to(result.dtype.element_ty), mask=mask)
