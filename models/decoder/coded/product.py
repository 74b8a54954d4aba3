"""Launches the fused product of few rows and a coded weight.

Owns the shape of a launch; lines and splits are those of the int8 product. Knows nothing of layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.triton_support import operand_of
from ..int8.product import MIN_SPLIT, TRIED_ROWS, Launch, Tiles, block_m_of
from . import coded_kernels as kernels
from .layout import Coding
from .weight import CodedWeight, quantize_fp8

_CODINGS = {
    Coding.INT8: kernels.INT8,
    Coding.FP8: kernels.FP8,
    Coding.INT4: kernels.INT4,
    Coding.TABLE4: kernels.TABLE4,
}


def tiles_of(num_rows: int, group: int) -> Tiles:
    """The tiles of a product of so many rows.

    A round reads inputs of one group where it can, and then one scale a channel: a scale for each
    code took more copies, and more shared memory, than the codes.
    """
    if group % 128 and group % 64 == 0:
        return Tiles(block_n=64, block_k=64)  # a table's values take the room of more stages
    return Tiles(num_stages={16: 6, 32: 4, 64: 3}[block_m_of(num_rows)])


def fused_product(rows: Tensor, weight: CodedWeight, tiles: Tiles | None = None) -> Tensor:
    """rows [n, in], columns in the weight's stored order, times the weight: [n, out].

    tiles: None chooses by the rows and the weight's groups.
    """
    num_rows, (num_out, num_in) = len(rows), weight.shape
    tiles = tiles or tiles_of(num_rows, weight.group)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    launch = Launch.of(rows, num_out, tiles)
    kernels.coded_product_kernel[launch.grid](
        rows,
        weight.codes,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        weight.scales if weight.table is None else weight.table,
        launch.output,
        num_rows,
        rows.stride(0),
        launch.per_split,
        OUT=num_out,
        IN=num_in,
        GROUP=weight.group,
        CODING=_CODINGS[weight.coding],
        HAS_ZEROS=weight.zeros is not None,
        BLOCK_M=launch.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        OPERAND=operand_of(rows),
        ROUNDED=kernels.type_of(rows.dtype),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return launch.result(rows.dtype)


def random_weight(
    coding: Coding, num_out: int, num_in: int, groups: int, seed: int = 0, has_zeros: bool = False
) -> CodedWeight:
    """A random coded weight: for a trial of the kernel, and for tests."""
    generator = torch.Generator().manual_seed(seed)
    scales = (0.5 + torch.rand(num_out, groups, generator=generator)) / num_in**0.5
    table, zeros = None, None
    if coding is Coding.FP8:
        codes = quantize_fp8(torch.randn(num_out, num_in, generator=generator)).codes
        scales /= 64
    elif coding is Coding.INT8:
        codes = torch.randint(-128, 128, (num_out, num_in), generator=generator, dtype=torch.int8)
        scales /= 64
    else:
        sizes = (num_out, num_in // 2)
        codes = torch.randint(0, 256, sizes, generator=generator, dtype=torch.uint8)
        scales /= 4
    if coding is Coding.TABLE4:
        table = torch.randn(16, generator=generator)
    if has_zeros:
        zeros = torch.randint(-8, 8, scales.shape, generator=generator, dtype=torch.int16)
    return CodedWeight(coding, codes, scales, zeros, table)


def trial_pairs(
    coding: Coding, device: torch.device, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """The kernel's and torch's results, for every number of rows of a program."""
    num_out, num_in = 96, 2 * MIN_SPLIT
    groups = num_in // (64 if coding is Coding.TABLE4 else 128)  # as the formats have them
    weight = random_weight(coding, num_out, num_in, groups, has_zeros=coding is Coding.INT4)
    generator, pairs = torch.Generator().manual_seed(1), []
    for num_rows in TRIED_ROWS:
        rows = torch.randn(num_rows, num_in, generator=generator).to(dtype)
        expected = rows.float() @ weight.decode(dtype=torch.float32).T
        actual = fused_product(rows.to(device), weight.to(device))
        pairs.append((actual.cpu(), expected))
    return pairs
