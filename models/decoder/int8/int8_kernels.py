"""The Triton kernels for few rows times an int8 weight; `product.py` launches them.

Imported only if triton is installed. A program computes BLOCK_N output channels of BLOCK_M rows
over one part of the input. It converts codes to the compute dtype in registers, and applies the
channels' scales to the sums. Programs of the same channels are neighbours, so that a GPU's cache
has the codes for all lines of rows but the first. A second kernel adds the parts, in order.
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
    per_split,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """rows [num_rows, IN] x codes [OUT, IN] -> output [splits, num_rows, OUT].

    per_split: inputs of a split, a multiple of BLOCK_K. OPERAND: the operands' dtype.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    is_channel = channel < OUT
    is_row = row < num_rows
    inner = split * per_split + tl.arange(0, BLOCK_K)
    row_at = rows + row.to(tl.int64)[:, None] * row_stride
    code_at = codes + channel.to(tl.int64)[:, None] * IN
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, per_split, BLOCK_K):
        place = inner + step
        is_place = place < IN
        x = tl.load(row_at + place[None, :], mask=is_row[:, None] & is_place[None, :], other=0.0)
        w = tl.load(code_at + place[None, :], mask=is_channel[:, None] & is_place[None, :], other=0)
        sums += tl.dot(x.to(OPERAND), tl.trans(w.to(OPERAND)), input_precision="ieee")
    sums *= tl.load(scales + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    at = (split.to(tl.int64) * num_rows + row[:, None]) * OUT + channel[None, :]
    mask = is_row[:, None] & is_channel[None, :]
    tl.store(output + at, sums.to(output.dtype.element_ty), mask=mask)


@triton.jit
def sum_parts_kernel(parts, output, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """parts float32 [SPLITS, size], summed in order -> output [size]."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + split * size + place, mask=mask, other=0.0)
    tl.store(output + place, total.to(output.dtype.element_ty), mask=mask)
