"""Decides how many blocks each pool gets: the split of memory between text and images.

Images want two full images for each running sequence; text wants `max_num_seqs` sequences of
`max_model_len`. If both fit the budget, both get that and the rest stays free. Otherwise images get
at most half of the budget, and text gets the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..batch import PoolSizes
from ..errors import ModelError

IMAGES_PER_SEQUENCE = 2


@dataclass(slots=True, frozen=True)
class PoolRequest:
    """The wanted pools; None leaves a value open.

    context_len: the model's limit; max_model_len: the user's. token_bytes: of one text token over
    the self-attention layers; tile_bytes: of one tile over the cross-attention layers.
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
    has_int8_images: bool = False


@dataclass(slots=True, frozen=True)
class PoolPlan:
    """The pools' sizes, and the longest sequence that they and the model allow."""

    sizes: PoolSizes
    max_model_len: int


def plan_pools(request: PoolRequest, budget_bytes: int) -> PoolPlan:
    """The pools that fit a budget. Raises ModelError, with the numbers, if none fit."""
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
            f"max_model_len is {length:,} but the text pool has only {max(capacity, 0):,} "
            "tokens: lower --max-model-len or raise --kv-cache-memory"
        )
    sizes = PoolSizes(
        num_text_blocks, num_image_blocks, request.block_size, request.has_int8_images
    )
    return PoolPlan(sizes, min(length, capacity))


def wanted_len(request: PoolRequest) -> int:
    """The requested length of a sequence. Raises ModelError if it exceeds the model's."""
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
    """The pools that fit every device's budget: a block is on all devices, so the least decides.

    requests: one for each device, with the bytes of a token and a tile on it.
    """
    plans = [
        plan_pools(request, budget_bytes)
        for request, budget_bytes in zip(requests, budgets, strict=True)
    ]
    num_text_blocks = min(plan.sizes.num_text_blocks for plan in plans)
    num_image_blocks = min(plan.sizes.num_image_blocks for plan in plans)
    first = plans[0].sizes
    sizes = replace(first, num_text_blocks=num_text_blocks, num_image_blocks=num_image_blocks)
    return PoolPlan(sizes, min(plan.max_model_len for plan in plans))
