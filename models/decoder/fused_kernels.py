"""The Triton kernels of the operations between a decoder's products; launched by kernel_launch.py.

Imported only if triton is installed. All kernels compute in float32 and round each result once. A
program computes one token or a part of it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["eps"])
def add_norm_kernel(
    hidden,
    update,
    weight,
    gate,
    row_mask,
    summed,
    normed,
    eps,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """hidden + update (times gate and the row's mask), and the RMS norm of that: [tokens, WIDTH].

    The norm is of the rounded sum.
    """
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PADDED_WIDTH)
    mask = place < WIDTH
    at = token * WIDTH + place
    added = tl.load(update + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_GATE:
        added *= tl.load(gate).to(tl.float32)
    if HAS_MASK:
        added *= tl.load(row_mask + token).to(tl.float32)
    total = tl.load(hidden + at, mask=mask, other=0.0).to(tl.float32) + added
    rounded = total.to(summed.dtype.element_ty)
    tl.store(summed + at, rounded, mask=mask)
    total = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(total * total, 0) / WIDTH + eps)
    result = total * scale * tl.load(weight + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed + at, result.to(normed.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["joined_stride"])
def rotate_and_write_kernel(
    joined,
    cos,
    sin,
    query,
    key_cache,
    value_cache,
    slots,
    joined_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
):
    """One head of one token: a query rotated, a key rotated to its slot, or a value to its slot.

    A negative slot is skipped. HALF: half of a head, whose two halves rotate into each other.
    """
    head_dim: tl.constexpr = 2 * HALF
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    place = tl.arange(0, PADDED_HALF)
    mask = place < HALF
    start = joined + token * joined_stride + head * head_dim
    low = tl.load(start + place, mask=mask, other=0.0)
    high = tl.load(start + HALF + place, mask=mask, other=0.0)
    if head < NUM_HEADS + NUM_KV_HEADS:
        first, second = low.to(tl.float32), high.to(tl.float32)
        at = token * head_dim + place
        c = tl.load(cos + at, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(sin + at, mask=mask, other=0.0).to(tl.float32)
        low = (first * c - second * s).to(joined.dtype.element_ty)
        high = (second * c + first * s).to(joined.dtype.element_ty)
    if head < NUM_HEADS:
        target = query + (token * NUM_HEADS + head) * head_dim
        tl.store(target + place, low, mask=mask)
        tl.store(target + HALF + place, high, mask=mask)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        if slot >= 0:
            kv_head = (head - NUM_HEADS) % NUM_KV_HEADS
            offset = (slot * NUM_KV_HEADS + kv_head) * head_dim + place
            if head < NUM_HEADS + NUM_KV_HEADS:
                tl.store(key_cache + offset, low, mask=mask)
                tl.store(key_cache + offset + HALF, high, mask=mask)
            else:
                tl.store(value_cache + offset, low, mask=mask)
                tl.store(value_cache + offset + HALF, high, mask=mask)


@triton.jit
def silu_gated_kernel(joined, output, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """silu(gate) * up of a part of one token's [2 * WIDTH], gate first."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = place < WIDTH
    start = joined + token * 2 * WIDTH
    gate = tl.load(start + place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(start + WIDTH + place, mask=mask, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(output + token * WIDTH + place, result.to(output.dtype.element_ty), mask=mask)
