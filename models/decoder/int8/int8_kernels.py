"""The Triton kernel for few rows times an int8 weight; `product.py` launches it.

Imported only if triton is installed. A program computes BLOCK_N output channels of BLOCK_M rows
over one of SPLIT_K parts of the input. It reads each code once, converts it to the compute dtype in
registers, and applies the channels' scales to the sums. The caller adds the parts in order, in
float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def int8_product_kernel(
    rows,
    codes,
    scales,
    output,
    num_rows,
    row_stride,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PER_SPLIT: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """rows [num_rows, IN] x codes [OUT, IN] -> output [splits, num_rows, OUT].

    PER_SPLIT: inputs of a split, a multiple of BLOCK_K. OPERAND: the operands' dtype.
    """
    channel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    is_channel = channel < OUT
    is_row = row < num_rows
    inner = split * PER_SPLIT + tl.arange(0, BLOCK_K)
    row_at = rows + row.to(tl.int64)[:, None] * row_stride
    code_at = codes + channel.to(tl.int64)[:, None] * IN
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, PER_SPLIT, BLOCK_K):
        place = inner + step
        is_place = place < IN
        x = tl.load(row_at + place[None, :], mask=is_row[:, None] & is_place[None, :], other=0.0)
        w = tl.load(code_at + place[None, :], mask=is_channel[:, None] & is_place[None, :], other=0)
        sums += tl.dot(x.to(OPERAND), tl.trans(w.to(OPERAND)), input_precision="ieee")
    sums *= tl.load(scales + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    at = (split.to(tl.int64) * num_rows + row[:, None]) * OUT + channel[None, :]
    mask = is_row[:, None] & is_channel[None, :]
    tl.store(output + at, sums.to(output.dtype.element_ty), mask=mask)
