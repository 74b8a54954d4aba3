"""Tries an attention backend on this machine before the first request, against the reference.

The trial takes some milliseconds and runs each of a backend's calls once. `kernels/self_test.py`
explains why a trial is needed.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..kernels import self_test
from .base import AttentionBackend, Geometry, PagedRows
from .int8_states import SCALE_DTYPE, Int8States, States
from .sdpa import SdpaBackend

NUM_BLOCKS = 6
# blocks of the longest row, whose keys the kernels cut into pieces; it repeats a few
LONG = 10


def what_is_wrong(backend: AttentionBackend, geometry: Geometry, block_size: int) -> str | None:
    """What was wrong in a trial of the backend, in a few words; None if it is right."""
    rows = _trial_rows(geometry, block_size)
    return self_test.what_is_wrong(lambda: [_outputs(backend, geometry, each) for each in rows])


def _trial_rows(geometry: Geometry, block_size: int) -> list[PagedRows]:
    """Decodes; decodes and chunks, over many blocks too; tokens that see no tile, one, or more."""
    table = np.tile([[4, 1], [2, 0], [5, 3]], LONG // 2)
    tiles = np.array([[0, 0], [4, 0], [2, 4], [1, 2]])
    size, num_patches = block_size, geometry.num_patches

    def rows(starts: list[int], key_lens: list[int], is_causal: bool) -> PagedRows:
        blocks, tokens = (table, size) if is_causal else (tiles, num_patches)
        return PagedRows(np.array(starts), np.array(key_lens), blocks, tokens, is_causal)

    two = 2 * num_patches
    return [
        rows([0, 1, 2, 3], [size + 3, size, 2 * size], is_causal=True),
        rows([0, 1, 8, 13], [LONG * size - 3, 7, LONG * size - 9], is_causal=True),
        rows([0, 2, 3, 7, 8], [0, num_patches, two, two], is_causal=False),
    ]


def _outputs(
    backend: AttentionBackend, geometry: Geometry, rows: PagedRows
) -> tuple[Tensor, Tensor]:
    """The backend's output, and the reference's for the same values in float32."""
    tensors = _tensors(geometry, rows)

    def attend(by: AttentionBackend, dtype: torch.dtype) -> Tensor:
        plan = by.prepare(rows, geometry.device, dtype)
        query, keys, values = (tensor.to(dtype) for tensor in tensors)
        stored = (_stored(states, geometry, rows) for states in (keys, values))
        key_cache, value_cache = stored
        return by.attend(query, key_cache, value_cache, plan, geometry.head_dim**-0.5)

    return attend(backend, geometry.dtype), attend(SdpaBackend(), torch.float32)


def _stored(states: Tensor, geometry: Geometry, rows: PagedRows) -> States:
    """A layer's keys or values as the pool of these rows has them."""
    if rows.is_causal or not geometry.has_int8_images:
        return states
    codes = torch.zeros(states.shape, dtype=torch.int8, device=states.device)
    scales = torch.zeros(states.shape[:-1], dtype=SCALE_DTYPE, device=states.device)
    stored = Int8States(codes, scales, states.dtype)
    num_slots = states.shape[0] * states.shape[1]
    stored.write(states.flatten(0, 1), torch.arange(num_slots, device=states.device))
    return stored


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
