"""Checks whether a model fits its devices, before a weight is read.

Owns the comparison and the advice in the error; `sizing.py` divides what is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import ModelError
from ..kv_cache.paged_cache import tile_bytes, token_bytes
from ..kv_cache.pool_sizes import PoolRequest, wanted_len
from ..lora.limits import AdapterLimits, limits_of, slot_bytes
from ..settings.byte_text import shown_bytes
from ..settings.runner_config import RunnerConfig
from ..weights.device_map import HEAD, TEXT, VISION, Placement, parts_of
from ..weights.loader import Checkpoint
from ..weights.quantization import INT4, METHODS, NF4, OWN_METHODS
from ..weights.tensor_loader import WHOLE, RankShare
from .available import AvailableMemoryOf
from .estimate import PeakBytes, by_kind, part_bytes, peak_bytes
from .peak_step import StepLimits

# without --max-model-len the context shrinks to fit its pool; a shorter one is of no use
LEAST_TEXT_TOKENS = 2048


@dataclass(slots=True, frozen=True)
class Plan:
    """The model and the options that decide its memory.

    share: this rank's share of the cut layers; pools are in a rank's bytes already. adapters: None
    without any. is_widened: the device computes products in float32. has_inserted: as in
    `peak_bytes`.
    """

    checkpoint: Checkpoint
    limits: StepLimits
    pools: PoolRequest
    quantize: str | None = None
    kv_cache_bytes: int | None = None
    share: RankShare = WHOLE
    adapters: AdapterLimits | None = None
    is_widened: bool = False
    has_inserted: bool = False


def plan_of(checkpoint: Checkpoint, config: RunnerConfig, share: RankShare) -> Plan:
    """The limits of a step and the request for pools, from a rank's share and the settings."""
    model_config: Any = checkpoint.meta_model.config
    text = model_config.text_config
    num_patches = int(checkpoint.meta_model.model.vision_model.num_patches)
    pools = PoolRequest(
        context_len=text.max_position_embeddings,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_tiles=model_config.vision_config.max_num_tiles,
        block_size=config.block_size or 1,
        num_text_blocks=config.num_text_blocks,
        num_image_blocks=config.num_image_blocks,
        has_int8_images=config.has_int8_images,
        token_bytes=token_bytes(text, checkpoint.dtype) // share.size,
        tile_bytes=tile_bytes(text, num_patches, checkpoint.dtype, config.has_int8_images)
        // share.size,
    )
    limits = StepLimits(
        config.max_num_seqs,
        config.max_num_batched_tokens,
        config.max_num_batched_images,
        wanted_len(pools),
    )
    adapters = limits_of(config, checkpoint.dtype)
    return Plan(checkpoint, limits, pools, config.quantize, config.kv_cache_bytes, share, adapters)


@dataclass(slots=True, frozen=True)
class Needs:
    """The least memory that a plan needs, by the model's parts.

    weights: bytes of each part. caches: bytes of keys and values of each decoder layer, for
    `text_tokens` tokens and `tiles` tiles, or from --kv-cache-memory. adapters: bytes of the slots
    of each part.
    """

    weights: Mapping[str, int]
    caches: Mapping[str, int]
    peak: PeakBytes
    text_tokens: int
    tiles: int
    adapters: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The sum, on one device."""
        kept = (self.weights, self.caches, self.adapters)
        return sum(sum(one.values()) for one in kept) + self.peak.most

    @property
    def beside_weights(self) -> dict[str, int]:
        """Bytes that stay beside the weights of each part: its caches and its adapters."""
        parts = dict.fromkeys((*self.caches, *self.adapters))
        return {one: self.caches.get(one, 0) + self.adapters.get(one, 0) for one in parts}


def peak_of(plan: Plan, limits: StepLimits) -> PeakBytes:
    """The activations of a step within these limits."""
    config, dtype = plan.checkpoint.meta_model.config, plan.checkpoint.dtype
    is_widened, has_inserted = plan.is_widened, plan.has_inserted
    return peak_bytes(config, limits, dtype, is_widened=is_widened, has_inserted=has_inserted)


def needs_of(plan: Plan) -> Needs:
    """The least memory that a plan needs, from the headers of its weights."""
    checkpoint, pools = plan.checkpoint, plan.pools
    parts = parts_of(checkpoint.meta_model)
    tokens = min(pools.max_model_len or LEAST_TEXT_TOKENS, pools.context_len)
    if pools.num_text_blocks is not None:
        tokens = pools.num_text_blocks * pools.block_size
    tiles = pools.num_image_blocks or pools.max_num_tiles
    limits = replace(plan.limits, max_model_len=tokens)
    return Needs(
        weights=part_bytes(parts, checkpoint.tensors, checkpoint.dtype, plan.quantize, plan.share),
        caches=_caches(plan, tokens, tiles),
        peak=peak_of(plan, limits),
        text_tokens=tokens,
        tiles=tiles,
        adapters=slot_bytes(checkpoint.meta_model, plan.share, plan.adapters),
    )


def _caches(plan: Plan, tokens: int, tiles: int) -> dict[str, int]:
    config: Any = plan.checkpoint.meta_model.config.text_config
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


def check_fits(plan: Plan, placement: Placement, available: AvailableMemoryOf) -> None:
    """Raise ModelError if a device lacks memory: one line with the sum and the remedy."""
    needs = needs_of(plan)
    for device in placement.holders():
        device_needs, memory = needs_on(placement, needs, device), available(device)
        if device_needs.total > memory.num_bytes:
            raise ModelError(
                f"{plan.checkpoint.folder}: does not fit {device}: "
                f"{_arithmetic(device_needs, needs)} = {shown_bytes(device_needs.total)}, and "
                f"{shown_bytes(memory.num_bytes)} are available ({memory.source}): "
                f"{_advice(plan, placement, device, memory.num_bytes)}"
            )


@dataclass(slots=True, frozen=True)
class DeviceNeeds:
    """Bytes that one device needs.

    weights: of the parts that stay on it. largest_offloaded: of the largest part that comes only to
    compute. cache: keys and values. peak: a step's activations.
    """

    weights: Mapping[str, int]
    largest_offloaded: int
    cache: int
    peak: int
    adapters: int = 0

    @property
    def resident_bytes(self) -> int:
        """Bytes of the weights that stay on the device."""
        return sum(self.weights.values())

    @property
    def total(self) -> int:
        return sum(
            (self.resident_bytes, self.largest_offloaded, self.cache, self.peak, self.adapters)
        )


def needs_on(placement: Placement, needs: Needs, device: torch.device) -> DeviceNeeds:
    """The memory that a placed model needs on one device."""
    computing = {part for part in needs.weights if placement.device_of(part) == device}
    resident = {part: size for part, size in needs.weights.items() if placement.holds(device, part)}
    offloaded = [needs.weights[part] for part in computing - resident.keys()]
    return DeviceNeeds(
        weights=resident,
        largest_offloaded=max(offloaded, default=0),
        cache=sum(size for part, size in needs.caches.items() if part in computing),
        peak=peak_on(placement, needs.peak, device),
        adapters=sum(size for part, size in needs.adapters.items() if part in computing),
    )


def peak_on(placement: Placement, peak: PeakBytes, device: torch.device) -> int:
    """The activations of the phases that a device computes."""
    phases = [
        peak.vision if placement.device_of(VISION) == device else 0,
        peak.text if device in placement.layer_devices() else 0,
        peak.sampling if placement.device_of(HEAD) == device else 0,
    ]
    return max(phases)


def _arithmetic(device: DeviceNeeds, needs: Needs) -> str:
    """The sum in words, one term for each kind of memory."""
    kinds = by_kind(device.weights).items()
    sizes = ", ".join(f"{kind} {shown_bytes(size)}" for kind, size in kinds if size)
    offloaded = f" + offloaded weights {shown_bytes(device.largest_offloaded)}"
    adapters = f" + slots of adapters {shown_bytes(device.adapters)}"
    return (
        f"weights {shown_bytes(device.resident_bytes)} ({sizes})"
        f"{offloaded if device.largest_offloaded else ''}{adapters if device.adapters else ''}"
        f" + KV cache of at least {shown_bytes(device.cache)} ({needs.text_tokens:,} text tokens, "
        f"{needs.tiles:,} image tiles) + activations of a step {shown_bytes(device.peak)}"
    )


def _advice(plan: Plan, placement: Placement, device: torch.device, num_bytes: int) -> str:
    """The changes that would make the model fit, the smallest first."""

    def fits(changed: Plan) -> bool:
        return needs_on(placement, needs_of(changed), device).total <= num_bytes

    remedies = []
    needs = needs_on(placement, needs_of(plan), device)
    if plan.kv_cache_bytes is not None and needs.total - needs.cache < num_bytes:
        remedies.append("a smaller --kv-cache-memory")
    remedies += [words for words, changed in _smaller_steps(plan) if fits(changed)][:1]
    if placement.single is not None:
        quantized = list(_quantized(plan))
        remedies += [
            f"{words} ({shown_bytes(needs_of(changed).total)} in all)"
            for words, changed in quantized
            if fits(changed)
        ] or [
            f"{words} with {smaller}"
            for words, quantized_plan in quantized
            for smaller, changed in _smaller_steps(quantized_plan)
            if fits(changed)
        ][:1]
    if placement.single is None:
        remedies.append("a --device-map or --max-memory that leaves more memory there")
    elif plan.quantize is None and not plan.checkpoint.is_coded and plan.share.size == 1:
        remedies.append("--device-map auto, which offloads the weights that do not fit")
    return "use " + ", or ".join(remedies or ["a larger machine"])


def _smaller_steps(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Plans with smaller limits, each with the option that sets it."""
    if (adapters := plan.adapters) is not None:
        for rank in (one for one in (32, 16, 8) if one < adapters.max_rank):
            yield (
                f"--max-lora-rank {rank}",
                replace(plan, adapters=replace(adapters, max_rank=rank)),
            )
        if adapters.max_loras > 1:
            yield "--max-loras 1", replace(plan, adapters=replace(adapters, max_loras=1))
    tokens = plan.pools.max_model_len or 0
    while (tokens := tokens // 2) >= LEAST_TEXT_TOKENS // 2:
        smaller = replace(plan, pools=replace(plan.pools, max_model_len=tokens))
        yield f"--max-model-len {tokens}", smaller
    if plan.limits.max_num_batched_images > 1:
        limits = replace(plan.limits, max_num_batched_images=1)
        yield "--max-num-batched-images 1", replace(plan, limits=limits)


def _quantized(plan: Plan) -> Iterator[tuple[str, Plan]]:
    if plan.checkpoint.is_coded:
        return
    methods = METHODS if plan.share.size == 1 else OWN_METHODS
    for method in methods:
        if method != plan.quantize:
            yield f"--quantize {method}", replace(plan, quantize=method)
    if NF4 not in methods:
        yield "a checkpoint in 4 bits", replace(plan, quantize=INT4)
