"""Launches the kernels of fused_kernels.py: their grids and outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.triton_support import power_of_2
from . import fused_kernels

# elements of the gated MLP's middle that one program computes
GATED_BLOCK = 1024


def add_norm(
    hidden: Tensor,
    update: Tensor,
    weight: Tensor,
    eps: float,
    gate: Tensor | None = None,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum [num_tokens, width], and its RMS norm. gate: one element; row_mask: [num_tokens, 1].

    hidden, update: of the same shape.
    """
    hidden, update = hidden.contiguous(), update.contiguous()
    num_tokens, width = hidden.shape
    summed, normed = torch.empty_like(hidden), torch.empty_like(hidden)
    fused_kernels.add_norm_kernel[(num_tokens,)](
        hidden,
        update,
        weight,
        weight if gate is None else gate,
        weight if row_mask is None else row_mask,
        summed,
        normed,
        eps,
        WIDTH=width,
        PADDED_WIDTH=power_of_2(width),
        HAS_GATE=gate is not None,
        HAS_MASK=row_mask is not None,
        num_warps=4 if width <= 2048 else 8,
    )
    return summed, normed


def rotate_and_write(
    joined: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    num_heads: int,
) -> Tensor:
    """The rotated queries, [num_tokens, num_heads, head_dim]; writes keys and values to slots.

    joined: [num_tokens, all heads side by side], queries, keys, values; caches: one layer's.
    """
    num_kv_heads, head_dim = key_cache.shape[-2:]
    joined = joined if joined.stride(-1) == 1 else joined.contiguous()
    num_tokens = len(joined)
    shape = (num_tokens, num_heads, head_dim)
    query = torch.empty(shape, dtype=joined.dtype, device=joined.device)
    fused_kernels.rotate_and_write_kernel[num_tokens, num_heads + 2 * num_kv_heads](
        joined,
        cos.contiguous(),
        sin.contiguous(),
        query,
        key_cache,
        value_cache,
        slots,
        joined.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=head_dim // 2,
        PADDED_HALF=power_of_2(head_dim // 2),
        num_warps=1,
    )
    return query


def silu_gated(joined: Tensor) -> Tensor:
    """silu(gate) * up of [num_tokens, 2 * width], gate first."""
    joined = joined.contiguous()
    num_tokens, width = len(joined), joined.shape[1] // 2
    output = torch.empty((num_tokens, width), dtype=joined.dtype, device=joined.device)
    block = min(GATED_BLOCK, power_of_2(width))
    fused_kernels.silu_gated_kernel[num_tokens, -(-width // block)](
        joined, output, WIDTH=width, BLOCK=block, num_warps=4
    )
    return output
