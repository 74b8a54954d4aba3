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
# elements of a sum of parts that one program computes
SUM_BLOCK = 1024
# one number of rows for each of the tiles, the last in several lines
TRIED_ROWS = (1, 2 * MIN_DOT, MAX_BLOCK_M, 2 * MAX_BLOCK_M + 1)


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

    @property
    def ahead_bytes(self) -> int:
        """Bytes of codes that a program has requested before it needs them."""
        return self.block_n * self.block_k * (self.num_stages - 1)


# Of int8, by the rows of a program: the first has the most codes in flight, which a decode step of
# small weights is short of. More rows take the shared memory of loads in flight.
TILES = Tiles(num_stages=6)
_TILES_BY_ROWS = {16: TILES, 32: Tiles(num_stages=4), 64: Tiles(block_n=64, num_stages=3)}
# several lines of rows: arithmetic, so few programs that use each code often
_TILES_OF_LINES = Tiles(block_n=128, block_k=64, num_warps=8, num_stages=4, num_programs=132)


def tiles_of(num_rows: int) -> Tiles:
    """The tiles of an int8 product of so many rows."""
    if num_rows > MAX_BLOCK_M:
        return _TILES_OF_LINES
    return _TILES_BY_ROWS[block_m_of(num_rows)]


def block_m_of(num_rows: int) -> int:
    """The rows of a program."""
    return min(MAX_BLOCK_M, max(MIN_DOT, power_of_2(num_rows)))


@dataclass(slots=True, frozen=True)
class Launch:
    """One launch: its grid [lines, columns, splits] and the parts of the output.

    Programs of the same channels follow each other. output: [splits, rows, out], in the rows'
    dtype, or float32 where parts are summed.
    """

    grid: tuple[int, int, int]
    block_m: int
    per_split: int
    output: Tensor

    @classmethod
    def of(cls, rows: Tensor, num_out: int, tiles: Tiles) -> Launch:
        """The launch for rows [n, in] and a weight of `num_out` channels."""
        num_rows, num_in = rows.shape
        block_m = block_m_of(num_rows)
        columns, lines = -(-num_out // tiles.block_n), -(-num_rows // block_m)
        num_splits = choose_splits(columns * lines, num_in, tiles.num_programs)
        per_split = -(-num_in // (num_splits * tiles.block_k)) * tiles.block_k
        num_splits = -(-num_in // per_split)
        dtype = rows.dtype if num_splits == 1 else torch.float32
        output = torch.empty((num_splits, num_rows, num_out), dtype=dtype, device=rows.device)
        return cls((lines, columns, num_splits), block_m, per_split, output)

    def result(self, dtype: torch.dtype) -> Tensor:
        """The sum of the parts: [n, out]."""
        parts = self.output
        if len(parts) == 1:
            return parts[0]
        summed = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
        size = summed.numel()
        int8_kernels.sum_parts_kernel[(-(-size // SUM_BLOCK),)](
            parts, summed, size, SPLITS=len(parts), BLOCK=SUM_BLOCK, num_warps=4
        )
        return summed


def fused_product(
    rows: Tensor, codes: Tensor, scales: Tensor, tiles: Tiles | None = None
) -> Tensor:
    """rows [n, in] times codes int8 [out, in] by scales [out]: [n, out] in the rows' dtype.

    tiles: None chooses by the rows.
    """
    num_rows, num_in = rows.shape
    num_out, tiles = len(codes), tiles or tiles_of(num_rows)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    launch = Launch.of(rows, num_out, tiles)
    int8_kernels.int8_product_kernel[launch.grid](
        rows,
        codes,
        scales,
        launch.output,
        num_rows,
        rows.stride(0),
        launch.per_split,
        OUT=num_out,
        IN=num_in,
        BLOCK_M=launch.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        OPERAND=operand_of(rows),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return launch.result(rows.dtype)


def choose_splits(num_tiles: int, num_in: int, num_programs: int = TILES.num_programs) -> int:
    """How many parts to cut the input into, so that few tiles still fill a GPU."""
    return max(1, min(num_programs // num_tiles, num_in // MIN_SPLIT))


def trial_pairs(device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Results of the kernel and of torch, with the tiles of every number of rows."""
    generator = torch.Generator().manual_seed(0)
    num_out, num_in = 3 * TILES.block_n, 2 * MIN_SPLIT
    codes = torch.randint(-127, 128, (num_out, num_in), generator=generator, dtype=torch.int8)
    scales = (torch.rand(num_out, generator=generator) / (127 * num_in**0.5)).to(dtype)
    pairs = []
    for num_rows in TRIED_ROWS:
        rows = torch.randn(num_rows, num_in, generator=generator).to(dtype)
        expected = rows.float() @ (codes.float() * scales.float()[:, None]).T
        actual = fused_product(rows.to(device), codes.to(device), scales.to(device))
        pairs.append((actual.cpu(), expected))
    return pairs
