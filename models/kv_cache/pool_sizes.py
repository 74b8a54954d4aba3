"""Decides how many blocks each pool gets.

Owns the split of memory between text and images. Knows nothing of tensors, of where the memory is
or of scheduling.

The split: images want room for two full images a running sequence, text wants `max_num_seqs`
sequences of `max_model_len`. Where both fit the budget, both get it and the rest stays free;
where not, images take at most half of the budget and text takes what they leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..batch import PoolSizes
from ..errors import ModelError

IMAGES_PER_SEQUENCE = 2


@dataclass(slots=True, frozen=True)
class PoolRequest:
    """What is asked of the pools; None leaves a value to be chosen.

    context_len: the model's own limit; max_model_len: the user's. Bytes are of one text token over
    the self-attention layers, and of one tile over the cross-attention layers.
    """

    context_len: int
    max_model_len: int | None
    max_num_seqs: int
    max_num_tiles: int
    block_size: int
    token_bytes: int
    tile_bytes: int
    num_text_blocks: int | None = None
    num_image_blocks: int | None = None


@dataclass(slots=True, frozen=True)
class PoolPlan:
    """The pools' sizes and the longest sequence that they and the model allow."""

    sizes: PoolSizes
    max_model_len: int


def plan_pools(request: PoolRequest, budget_bytes: int) -> PoolPlan:
    """The pools that fit a budget. Raises ModelError, naming the numbers, where none fit."""
    length = wanted_len(request)
    num_image_blocks = request.num_image_blocks or _image_blocks(request, budget_bytes)
    if num_image_blocks < request.max_num_tiles:
        raise ModelError(
            f"the image pool has {num_image_blocks} tiles and one image may take "
            f"{request.max_num_tiles}: raise --num-image-blocks or --kv-cache-memory"
        )
    left_bytes = budget_bytes - num_image_blocks * request.tile_bytes
    num_text_blocks = request.num_text_blocks or _text_blocks(request, length, left_bytes)
    capacity = num_text_blocks * request.block_size
    if capacity < 1 or (request.max_model_len is not None and capacity < length):
        raise ModelError(
            f"max_model_len is {length:,} and the text pool has room for {max(capacity, 0):,} "
            "tokens: lower --max-model-len or raise --kv-cache-memory"
        )
    sizes = PoolSizes(num_text_blocks, num_image_blocks, request.block_size)
    return PoolPlan(sizes, min(length, capacity))


def wanted_len(request: PoolRequest) -> int:
    """The longest sequence asked for. Raises ModelError if the model cannot take it."""
    if request.max_model_len is not None and request.max_model_len > request.context_len:
        raise ModelError(
            f"max_model_len is {request.max_model_len:,} and the model's context is "
            f"{request.context_len:,}: lower --max-model-len"
        )
    return request.max_model_len or request.context_len


def _image_blocks(request: PoolRequest, budget_bytes: int) -> int:
    wanted = request.max_num_seqs * request.max_num_tiles * IMAGES_PER_SEQUENCE
    return min(wanted, budget_bytes // 2 // max(1, request.tile_bytes))


def _text_blocks(request: PoolRequest, length: int, left_bytes: int) -> int:
    wanted = request.max_num_seqs * (-(-length // request.block_size))
    return min(wanted, left_bytes // max(1, request.token_bytes * request.block_size))


def plan_over_devices(requests: Sequence[PoolRequest], budgets: Sequence[int]) -> PoolPlan:
    """The pools that fit each device's budget: a block lies on all of them, so the least decides.

    requests: one a device, with the bytes that a token and a tile take there.
    """
    plans = [
        plan_pools(request, budget_bytes)
        for request, budget_bytes in zip(requests, budgets, strict=True)
    ]
    num_text_blocks = min(plan.sizes.num_text_blocks for plan in plans)
    num_image_blocks = min(plan.sizes.num_image_blocks for plan in plans)
    sizes = PoolSizes(num_text_blocks, num_image_blocks, requests[0].block_size)
    return PoolPlan(sizes, min(plan.max_model_len for plan in plans))
