"""The Triton kernel of few rows times a coded weight.

Owns the program. Knows nothing of layers; `product.py` launches it. Imported only with triton.

A program computes BLOCK_N output channels of BLOCK_M rows over one part of the input: it decodes
codes in registers, rounds them to the compute type and multiplies. Programs of the same channels
are neighbours. The parts are added in float32 and in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Coding as numbers that a kernel can compare, those of 4 bits last
INT8, FP8, INT4, TABLE4 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit(do_not_specialize=["num_rows"])
def coded_product_kernel(
    rows,
    codes,
    scales,
    zeros,
    table,
    output,
    num_rows,
    row_stride,
    per_split,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    CODING: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr,
    ROUNDED: tl.constexpr,
):
    """rows [num_rows, IN] x codes [OUT, IN or IN / 2] -> output [splits, num_rows, OUT].

    per_split: inputs of a split, a multiple of BLOCK_K. OPERAND: the type of the products' inputs;
    ROUNDED: the compute type, to which decoded weights are rounded first.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    is_channel = channel < OUT
    is_row = row < num_rows
    inner = split * per_split + tl.arange(0, BLOCK_K)
    row_at = rows + row.to(tl.int64)[:, None] * row_stride
    GROUPS: tl.constexpr = IN // GROUP
    IS_NIBBLE: tl.constexpr = CODING >= INT4
    PER_ROW: tl.constexpr = IN // 2 if IS_NIBBLE else IN
    code_at = codes + channel.to(tl.int64)[:, None] * PER_ROW
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, tl.minimum(per_split, IN - split * per_split), BLOCK_K):
        place = inner + step
        is_place = place < IN
        x = tl.load(row_at + place[None, :], mask=is_row[:, None] & is_place[None, :], other=0.0)
        mask = is_channel[:, None] & is_place[None, :]
        if IS_NIBBLE:
            pair = tl.load(code_at + (place // 2)[None, :], mask=mask, other=0).to(tl.int32)
            code = (pair >> ((place % 2) * 4)[None, :]) & 15
            w = tl.load(table + code) if CODING == TABLE4 else (code - 8).to(tl.float32)
        else:
            code = tl.load(code_at + place[None, :], mask=mask, other=0)
            if CODING == FP8:
                # E4M3's exponent and mantissa in float16's places: smaller by 2 ** 8
                bits = code.to(tl.int16)
                half = ((bits & 127) << 7) | ((bits & 128) << 8)
                w = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
            else:
                w = code.to(tl.float32)
        if GROUP % BLOCK_K == 0:
            # all inputs of the round are in one group
            group = (split * per_split + step) // GROUP
            at = (channel.to(tl.int64) * GROUPS + group)[:, None]
            is_group = is_channel[:, None]
        else:
            at = channel.to(tl.int64)[:, None] * GROUPS + (place // GROUP)[None, :]
            is_group = mask
        if HAS_ZEROS:
            w -= tl.load(zeros + at, mask=is_group, other=0).to(tl.float32)
        w *= tl.load(scales + at, mask=is_group, other=0.0)
        w = w.to(ROUNDED).to(OPERAND)
        sums += tl.dot(x.to(OPERAND), tl.trans(w), input_precision="ieee")
    at_out = (split.to(tl.int64) * num_rows + row[:, None]) * OUT + channel[None, :]
    out_mask = is_row[:, None] & is_channel[None, :]
    tl.store(output + at_out, sums.to(output.dtype.element_ty), mask=out_mask)


def type_of(dtype: object) -> object:
    """Triton's name of a torch type, such as tl.bfloat16."""
    return getattr(tl, str(dtype).rpartition(".")[2])
