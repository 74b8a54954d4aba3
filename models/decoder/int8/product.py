"""Launches the fused int8 product: its tiles, and how many parts the input is cut into."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.triton_support import MIN_DOT, operand_of, power_of_2
from . import int8_kernels

MAX_BLOCK_M = 64
# a smaller part costs more in sums than it saves
MIN_SPLIT = 1024


@dataclass(slots=True, frozen=True)
class Tiles:
    """How a product is cut: channels and inputs that a program computes at once, and its warps.

    num_stages: loads in flight while computing. num_programs: the wanted number; the default fills
    a GPU of about 130 processors twice.
    """

    block_n: int = 32
    block_k: int = 128
    num_warps: int = 4
    num_stages: int = 3
    num_programs: int = 264


TILES = Tiles()


@dataclass(slots=True, frozen=True)
class Launch:
    """One launch: its grid [columns, lines, splits] and the parts of the output.

    output: [splits, rows, out], in the rows' dtype, or float32 where parts are summed.
    """

    grid: tuple[int, int, int]
    block_m: int
    per_split: int
    output: Tensor

    @classmethod
    def of(cls, rows: Tensor, num_out: int, tiles: Tiles) -> Launch:
        """The launch for rows [n, in] and a weight of `num_out` channels."""
        num_rows, num_in = rows.shape
        block_m = min(MAX_BLOCK_M, max(MIN_DOT, power_of_2(num_rows)))
        columns, lines = -(-num_out // tiles.block_n), -(-num_rows // block_m)
        num_splits = choose_splits(columns * lines, num_in, tiles.num_programs)
        per_split = -(-num_in // (num_splits * tiles.block_k)) * tiles.block_k
        num_splits = -(-num_in // per_split)
        dtype = rows.dtype if num_splits == 1 else torch.float32
        output = torch.empty((num_splits, num_rows, num_out), dtype=dtype, device=rows.device)
        return cls((columns, lines, num_splits), block_m, per_split, output)

    def result(self, dtype: torch.dtype) -> Tensor:
        """The sum of the parts: [n, out]."""
        return self.output[0] if len(self.output) == 1 else self.output.sum(0).to(dtype)


def fused_product(rows: Tensor, codes: Tensor, scales: Tensor, tiles: Tiles = TILES) -> Tensor:
    """rows [n, in] times codes int8 [out, in] by scales [out]: [n, out] in the rows' dtype."""
    num_rows, num_in = rows.shape
    num_out = len(codes)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    launch = Launch.of(rows, num_out, tiles)
    int8_kernels.int8_product_kernel[launch.grid](
        rows,
        codes,
        scales,
        launch.output,
        num_rows,
        rows.stride(0),
        OUT=num_out,
        IN=num_in,
        BLOCK_M=launch.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        PER_SPLIT=launch.per_split,
        OPERAND=operand_of(rows),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return launch.result(rows.dtype)


def choose_splits(num_tiles: int, num_in: int, num_programs: int = TILES.num_programs) -> int:
    """How many parts to cut the input into, so that few tiles still fill a GPU."""
    return max(1, min(num_programs // num_tiles, num_in // MIN_SPLIT))


def trial_pairs(device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Results of the kernel and of torch, for one row and for a full program."""
    generator = torch.Generator().manual_seed(0)
    num_out, num_in = 3 * TILES.block_n, 2 * MIN_SPLIT
    codes = torch.randint(-127, 128, (num_out, num_in), generator=generator, dtype=torch.int8)
    scales = (torch.rand(num_out, generator=generator) / (127 * num_in**0.5)).to(dtype)
    pairs = []
    for num_rows in (1, MAX_BLOCK_M):
        rows = torch.randn(num_rows, num_in, generator=generator).to(dtype)
        expected = rows.float() @ (codes.float() * scales.float()[:, None]).T
        actual = fused_product(rows.to(device), codes.to(device), scales.to(device))
        pairs.append((actual.cpu(), expected))
    return pairs
