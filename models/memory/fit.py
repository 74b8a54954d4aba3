"""Whether a model fits its devices, told with the arithmetic before a weight is read.

Owns the comparison and what is advised where it fails. Knows nothing of how weights are read or of
how what is left is shared out between the pools.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..byte_text import shown_bytes
from ..errors import ModelError
from ..kv_cache.pool_sizes import PoolRequest
from ..weights.device_map import HEAD, TEXT, VISION, Placement, parts_of
from ..weights.loader import Checkpoint
from ..weights.quantization import METHODS
from ..weights.tensor_loader import WHOLE, RankShare
from .available import RoomOf
from .estimate import PeakBytes, by_kind, part_bytes, peak_bytes
from .peak_step import StepLimits

# without --max-model-len the context shrinks to its pool: less than this serves nobody
LEAST_TEXT_TOKENS = 2048
_LAYER = f"{TEXT}.layers."


@dataclass(slots=True, frozen=True)
class Plan:
    """What is to be served and how: all that needs follow from.

    share: this rank's part of the cut layers; pools are in a rank's bytes already.
    """

    checkpoint: Checkpoint
    limits: StepLimits
    pools: PoolRequest
    quantize: str | None = None
    kv_cache_bytes: int | None = None
    share: RankShare = WHOLE


@dataclass(slots=True, frozen=True)
class Needs:
    """What a plan takes at least, by the model's parts.

    weights: bytes of each part. caches: bytes of keys and values of each decoder layer, for
    `text_tokens` tokens and `tiles` tiles, or what --kv-cache-memory asks for.
    """

    weights: Mapping[str, int]
    caches: Mapping[str, int]
    peak: PeakBytes
    text_tokens: int
    tiles: int

    @property
    def total(self) -> int:
        """All of it on one device."""
        return sum(self.weights.values()) + sum(self.caches.values()) + self.peak.most


def needs_of(plan: Plan) -> Needs:
    """What the plan takes at least, from the headers of its weights."""
    checkpoint, pools = plan.checkpoint, plan.pools
    parts = parts_of(checkpoint.skeleton)
    tokens = min(pools.max_model_len or LEAST_TEXT_TOKENS, pools.context_len)
    if pools.num_text_blocks is not None:
        tokens = pools.num_text_blocks * pools.block_size
    tiles = pools.num_image_blocks or pools.max_num_tiles
    return Needs(
        weights=part_bytes(parts, checkpoint.tensors, checkpoint.dtype, plan.quantize, plan.share),
        caches=_caches(plan, tokens, tiles),
        peak=peak_bytes(
            checkpoint.skeleton.config,
            replace(plan.limits, max_model_len=tokens),
            checkpoint.dtype,
        ),
        text_tokens=tokens,
        tiles=tiles,
    )


def _caches(plan: Plan, tokens: int, tiles: int) -> dict[str, int]:
    config: Any = plan.checkpoint.skeleton.config.text_config
    cross = set(config.cross_attention_layers or ())
    num_self = config.num_hidden_layers - len(cross)
    if plan.kv_cache_bytes is not None:
        text = image = plan.kv_cache_bytes // config.num_hidden_layers
    else:
        text = tokens * plan.pools.token_bytes // max(1, num_self)
        image = tiles * plan.pools.tile_bytes // max(1, len(cross))
    return {
        f"{TEXT}.layers.{index}": image if index in cross else text
        for index in range(config.num_hidden_layers)
    }


def check_fits(plan: Plan, placement: Placement, room_of: RoomOf) -> None:
    """Raise ModelError, one line with the arithmetic and the remedy, unless every device has room.

    Nothing has been read of the weights but their headers.
    """
    needs = needs_of(plan)
    for device in placement.holders():
        share, room = share_of(placement, needs, device), room_of(device)
        if share.total > room.num_bytes:
            raise ModelError(
                f"{plan.checkpoint.folder}: does not fit {device}: {_arithmetic(share, needs)} = "
                f"{shown_bytes(share.total)}, and there are {shown_bytes(room.num_bytes)} "
                f"({room.source}): {_advice(plan, placement, device, room.num_bytes)}"
            )


@dataclass(slots=True, frozen=True)
class Share:
    """What one device holds: its parts' weights, room for the largest visitor, caches, a step."""

    weights: Mapping[str, int]
    visitor: int
    cache: int
    peak: int

    @property
    def resident_bytes(self) -> int:
        """What weights take all the time."""
        return sum(self.weights.values())

    @property
    def total(self) -> int:
        return self.resident_bytes + self.visitor + self.cache + self.peak


def share_of(placement: Placement, needs: Needs, device: torch.device) -> Share:
    """What a device holds of a placed model."""
    computing = {part for part in needs.weights if placement.device_of(part) == device}
    resident = {part: size for part, size in needs.weights.items() if placement.holds(device, part)}
    visitors = [needs.weights[part] for part in computing - resident.keys()]
    return Share(
        weights=resident,
        visitor=max(visitors, default=0),
        cache=sum(size for part, size in needs.caches.items() if part in computing),
        peak=peak_on(placement, needs.peak, device),
    )


def peak_on(placement: Placement, peak: PeakBytes, device: torch.device) -> int:
    """The activations of the phases that a device computes."""
    phases = [
        peak.vision if placement.device_of(VISION) == device else 0,
        peak.text if device in placement.layer_devices() else 0,
        peak.sampling if placement.device_of(HEAD) == device else 0,
    ]
    return max(phases)


def _arithmetic(share: Share, needs: Needs) -> str:
    """The sum in words, one term a kind of memory."""
    kinds = [f"{kind} {shown_bytes(size)}" for kind, size in by_kind(share.weights).items() if size]
    weights = f"weights {shown_bytes(share.resident_bytes)} ({', '.join(kinds)})"
    visitor = f" + {shown_bytes(share.visitor)} for offloaded ones" if share.visitor else ""
    cache = (
        f" + KV cache of at least {shown_bytes(share.cache)} ({needs.text_tokens:,} text tokens, "
        f"{needs.tiles:,} image tiles)"
    )
    return f"{weights}{visitor}{cache} + activations of a step {shown_bytes(share.peak)}"


def _advice(plan: Plan, placement: Placement, device: torch.device, room: int) -> str:
    """What would make it fit, the least change first."""

    def fits(changed: Plan) -> bool:
        return share_of(placement, needs_of(changed), device).total <= room

    remedies = []
    share = share_of(placement, needs_of(plan), device)
    if plan.kv_cache_bytes is not None and share.total - share.cache < room:
        remedies.append("a smaller --kv-cache-memory")
    remedies += [words for words, changed in _smaller_steps(plan) if fits(changed)][:1]
    if placement.single is not None:
        quantized = list(_quantized(plan))
        remedies += [f"{words}{_in_all(one)}" for words, one in quantized if fits(one)] or [
            f"{words} with {smaller}"
            for words, one in quantized
            for smaller, changed in _smaller_steps(one)
            if fits(changed)
        ][:1]
    if placement.single is None:
        remedies.append("a --device-map or --max-memory that leaves more room there")
    elif plan.quantize is None:
        remedies.append("--device-map auto, which keeps elsewhere what has no room")
    return "use " + ", or ".join(remedies or ["a larger machine"])


def _smaller_steps(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """The plan with less of what was asked for, and the options that say so."""
    tokens = plan.pools.max_model_len or 0
    while (tokens := tokens // 2) >= LEAST_TEXT_TOKENS // 2:
        smaller = replace(plan, pools=replace(plan.pools, max_model_len=tokens))
        yield f"--max-model-len {tokens}", smaller
    if plan.limits.max_num_batched_images > 1:
        limits = replace(plan.limits, max_num_batched_images=1)
        yield "--max-num-batched-images 1", replace(plan, limits=limits)


def _quantized(plan: Plan) -> Iterator[tuple[str, Plan]]:
    for method in METHODS:
        if method != plan.quantize:
            yield f"--quantize {method}", replace(plan, quantize=method)


def _in_all(plan: Plan) -> str:
    return f" ({shown_bytes(needs_of(plan).total)} in all)"
