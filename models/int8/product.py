"""Launches the fused int8 product: its tiles, and how many stretches the input is cut into.

Owns the shape of a launch. Knows nothing of layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..triton_launch import MIN_DOT, operand_of, power_of_2
from . import int8_kernels

BLOCK_N = 32
BLOCK_K = 128
MAX_BLOCK_M = 64
# programs that fill a GPU of about 130 processors twice
WANTED_PROGRAMS = 264
# a stretch below this costs more in sums than it gains
MIN_SPLIT = 1024


def fused_product(rows: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """rows [n, in] times codes int8 [out, in] by scales [out]: [n, out] in the rows' dtype."""
    num_rows, num_in = rows.shape
    num_out = len(codes)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    block_m = min(MAX_BLOCK_M, max(MIN_DOT, power_of_2(num_rows)))
    tiles = -(-num_out // BLOCK_N) * -(-num_rows // block_m)
    num_splits = choose_splits(tiles, num_in)
    per_split = -(-num_in // (num_splits * BLOCK_K)) * BLOCK_K
    num_splits = -(-num_in // per_split)
    dtype = rows.dtype if num_splits == 1 else torch.float32
    output = torch.empty((num_splits, num_rows, num_out), dtype=dtype, device=rows.device)
    grid = (-(-num_out // BLOCK_N), -(-num_rows // block_m), num_splits)
    int8_kernels.int8_product_kernel[grid](
        rows,
        codes,
        scales,
        output,
        num_rows,
        rows.stride(0),
        OUT=num_out,
        IN=num_in,
        BLOCK_M=block_m,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        PER_SPLIT=per_split,
        OPERAND=operand_of(rows),
        num_warps=4,
        num_stages=3,
    )
    return output[0] if num_splits == 1 else output.sum(0).to(rows.dtype)


def choose_splits(num_tiles: int, num_in: int) -> int:
    """Stretches of the input, so that a small weight's few tiles still fill a GPU."""
    return max(1, min(WANTED_PROGRAMS // num_tiles, num_in // MIN_SPLIT))
