"""Tries a backend on this machine before the first request: a step's rows, against the reference.

Owns the rows of the trial and the tolerance. Knows no backend by name but the reference.

A kernel depends on the driver, the GPU and two packages' builds, none of which a test of this
project's can promise. The trial costs some milliseconds and runs each of a backend's calls once.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .base import AttentionBackend, Geometry, PagedRows
from .sdpa import SdpaBackend

# both compute in half precision on values of order 1
TOLERANCE = 3e-2
NUM_BLOCKS = 6


def what_is_wrong(backend: AttentionBackend, geometry: Geometry, block_size: int) -> str | None:
    """What a trial of the backend showed to be wrong, in a few words; None if it is right."""
    for rows in _trial_rows(geometry, block_size):
        try:
            error = _largest_error(backend, geometry, rows)
        except Exception as failure:  # a kernel's package raises what it likes
            line = " ".join(str(failure).split())[:200]
            return f"a trial of it failed: {type(failure).__name__}: {line}"
        if not error <= TOLERANCE:  # NaN is wrong too
            return f"a trial of it was off by {error:.3g}"
    return None


def _trial_rows(geometry: Geometry, block_size: int) -> list[PagedRows]:
    """Decodes; decodes beside chunks; tokens that see no tile, one, two, and a shared one."""
    table = np.array([[4, 1], [2, 0], [5, 3]])
    tiles = np.array([[0, 0], [4, 0], [2, 4], [1, 2]])
    size, num_patches = block_size, geometry.num_patches

    def rows(starts: list[int], key_lens: list[int], is_causal: bool) -> PagedRows:
        blocks, tokens = (table, size) if is_causal else (tiles, num_patches)
        return PagedRows(np.array(starts), np.array(key_lens), blocks, tokens, is_causal)

    two = 2 * num_patches
    return [
        rows([0, 1, 2, 3], [size + 3, size, 2 * size], is_causal=True),
        rows([0, 1, 8, 13], [size + 3, 7, size + 9], is_causal=True),
        rows([0, 2, 3, 7, 8], [0, num_patches, two, two], is_causal=False),
    ]


@torch.inference_mode()
def _largest_error(backend: AttentionBackend, geometry: Geometry, rows: PagedRows) -> float:
    query, keys, values = _tensors(geometry, rows)
    outputs = []
    for one in (backend, SdpaBackend()):
        plan = one.prepare(rows, geometry.device, geometry.dtype)
        outputs.append(one.attend(query, keys, values, plan, geometry.head_dim**-0.5).float())
    return (outputs[0] - outputs[1]).abs().max().item()


def _tensors(geometry: Geometry, rows: PagedRows) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values, the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    cache = (NUM_BLOCKS, rows.block_size, geometry.num_kv_heads, geometry.head_dim)
    shapes = ((rows.num_queries, geometry.num_heads, geometry.head_dim), cache, cache)
    query, keys, values = (
        torch.randn(shape, generator=generator).to(geometry.device, geometry.dtype)
        for shape in shapes
    )
    return query, keys, values
