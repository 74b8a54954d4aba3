"""Reads an adapter's weights into host memory, checked against the model's sites.

Takes the names that PEFT and Unsloth write, before and after transformers 4.52, with and without
PEFT's prefix. Only a rank's share is kept, in the type of the slots.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from torch import Tensor

from ..batch import AdapterInfo, AdapterRef
from ..errors import AdapterError
from ..tensor_parallel.plan import HEAD, Side
from ..weights.device_map import TEXT
from ..weights.formats.safetensors_headers import PEFT_PREFIX, module_name
from ..weights.meta_model import one_line
from ..weights.tensor_loader import RankShare
from .config import AdapterConfig, read_config
from .files import WEIGHTS, read_files
from .sites import Part, Site

_MAX_HEADER_BYTES = 1 << 20
_NAME = re.compile(r"(?P<layer>.+)\.lora_(?P<matrix>[AB])(?:\.[^.]+)?\.weight")
# of layers in models that were trained as parts: only the text model, or without the head
_OF_PARTS = {"model.layers.": f"{TEXT}.layers.", "language_model.layers.": f"{TEXT}.layers."}
_OTHERS = {
    ".lora_magnitude_vector": "belongs to DoRA, which is not served",
    ".lora_embedding_": "changes an embedding, which is not served",
    ".modules_to_save.": "is a whole layer (modules_to_save), which is not served",
    ".base_layer.": "is a weight of the base model",
    ".bias": "is a bias, which is not served",
}


@dataclass(slots=True, frozen=True)
class SiteWeights:
    """An adapter's weights at one site, on the host.

    a: [rank, in], the parts' A one below the other. blocks: for each part with weights its first
    rank, its first output, and B^T [its rank, its outputs], multiplied with its scale.
    """

    a: Tensor
    blocks: Sequence[tuple[int, int, Tensor]]

    @property
    def rank(self) -> int:
        """Of all parts together."""
        return len(self.a)

    @property
    def num_bytes(self) -> int:
        """In host memory."""
        return sum(one.nbytes for one in (self.a, *(block for _, _, block in self.blocks)))


@dataclass(slots=True, frozen=True)
class HostAdapter:
    """An adapter in host memory: its weights at the sites that it changes."""

    info: AdapterInfo
    weights: Mapping[Site, SiteWeights]


@dataclass(slots=True, frozen=True)
class ReadLimits:
    """What is read: up to which rank, in which type, and which rank's share."""

    max_rank: int
    dtype: torch.dtype
    share: RankShare


@dataclass(slots=True)
class _Pair:
    """The two matrices of a layer. source: its name in the file, without prefix and ending."""

    source: str
    a: Tensor | None = None
    b: Tensor | None = None


def read_adapter(ref: AdapterRef, sites: Sequence[Site], limits: ReadLimits) -> HostAdapter:
    """The adapter of a folder. Raises AdapterError, one line that names the file or tensor."""
    settings, content = read_files(ref.folder, ref.digest, _most_bytes(sites, limits))
    config = read_config(settings)
    pairs = _pairs(_tensors(content))
    parts = {part.name: (site, part) for site in sites for part in site.parts}
    _check_layers(pairs, parts, config)
    weights: dict[Site, SiteWeights] = {}
    for site in sites:
        found = [(part, pairs[part.name]) for part in site.parts if part.name in pairs]
        if found:
            weights[site] = _site_weights(found, config, limits)
    return HostAdapter(_info(weights, pairs, config), weights)


def _most_bytes(sites: Sequence[Site], limits: ReadLimits) -> int:
    """The largest file of an adapter: of the highest rank in all layers, in float64."""
    width = sum(sum(part.whole) for site in sites for part in site.parts)
    return width * limits.max_rank * torch.float64.itemsize + _MAX_HEADER_BYTES


def _info(
    weights: Mapping[Site, SiteWeights], pairs: Mapping[str, _Pair], config: AdapterConfig
) -> AdapterInfo:
    return AdapterInfo(
        rank=max(len(pair.a) for pair in pairs.values() if pair.a is not None),
        num_bytes=sum(one.num_bytes for one in weights.values()),
        changes_text=any(not site.reads_images for site in weights),
        changes_images=any(site.reads_images for site in weights),
        base_model=config.base_model_name_or_path or "",
    )


def _tensors(content: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises AdapterError if it is damaged."""
    try:
        return dict(load_bytes(content))
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise AdapterError(
            f"{WEIGHTS} is damaged: {_how(content) or one_line(error)}; download it again"
        ) from None


def _how(content: bytes) -> str | None:
    """How a file is too short or too long; None if its length is right or unknown."""
    length = int.from_bytes(content[:8], "little")
    try:
        entries: dict[str, Any] = json.loads(content[8 : 8 + length])
        entries.pop("__metadata__", None)
        expected = 8 + length + max(entry["data_offsets"][1] for entry in entries.values())
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return f"it is cut short ({len(content):,} bytes)" if 8 + length > len(content) else None
    if expected == len(content):
        return None
    what = "cut short" if len(content) < expected else "too long"
    return f"it is {what} ({len(content):,} bytes of {expected:,})"


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, _Pair]:
    """The matrices by the layer's name in the model."""
    pairs: dict[str, _Pair] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            known = next((what for mark, what in _OTHERS.items() if mark in name), None)
            raise AdapterError(f"{name} {known or 'is not a weight of LoRA'}")
        pair = pairs.setdefault(layer_name(match["layer"]), _Pair(_without_prefix(match["layer"])))
        side = match["matrix"].lower()
        if getattr(pair, side) is not None:
            raise AdapterError(f"{name} is twice in {WEIGHTS}, under an old and a new name")
        setattr(pair, side, tensor)
    if not pairs:
        raise AdapterError(f"{WEIGHTS} has no weights")
    return pairs


def layer_name(source: str) -> str:
    """The name in the model of a layer that is named `source` in an adapter's file."""
    name = module_name(f"{source}.").removesuffix(".")
    for old, new in _OF_PARTS.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _without_prefix(source: str) -> str:
    return source.removeprefix(PEFT_PREFIX)


def _check_layers(
    pairs: Mapping[str, _Pair], parts: Mapping[str, tuple[Site, Part]], config: AdapterConfig
) -> None:
    """Raise AdapterError for layers that the model lacks, and for layers without weights."""
    for name, pair in pairs.items():
        if name == HEAD:
            raise AdapterError(f"{pair.source}: an adapter of the head is not served")
        if name not in parts:
            raise AdapterError(
                f"{pair.source}: the model has no such layer: the adapter is of another model or "
                "of another size"
            )
        for matrix in ("A", "B"):
            if getattr(pair, matrix.lower()) is None:
                raise AdapterError(f"{pair.source}.lora_{matrix}.weight is missing")
    for target in config.target_modules if isinstance(config.target_modules, list) else ():
        _check_target(target, pairs, parts)


def _check_target(
    target: str, pairs: Mapping[str, _Pair], parts: Mapping[str, tuple[Site, Part]]
) -> None:
    """Raise AdapterError if a target of the decoder has weights in no layer."""
    named = [n for n in parts if n.startswith(f"{TEXT}.") and f".{n}".endswith(f".{target}")]
    if named and not any(name in pairs for name in named):
        raise AdapterError(f"{WEIGHTS} has no weights of {target}, which target_modules names")


def _site_weights(
    found: Sequence[tuple[Part, _Pair]], config: AdapterConfig, limits: ReadLimits
) -> SiteWeights:
    rows, blocks, begin = [], [], 0
    for part, pair in found:
        a, b = _checked(part, pair, config, limits)
        scaled = b.float() * config.scale_of(pair.source)
        inputs = part.slice_of(Side.IN, limits.share)
        outputs = part.slice_of(Side.OUT, limits.share)
        rows.append(_converted(a[:, inputs], f"{pair.source}.lora_A.weight", limits.dtype))
        block = _converted(scaled[outputs].T, f"{pair.source}.lora_B.weight", limits.dtype)
        blocks.append((begin, part.begin, block))
        begin += len(a)
    return SiteWeights(torch.cat(rows), blocks)


def _checked(
    part: Part, pair: _Pair, config: AdapterConfig, limits: ReadLimits
) -> tuple[Tensor, Tensor]:
    """Both matrices, of the right shapes. Raises AdapterError."""
    a, b = cast(Tensor, pair.a), cast(Tensor, pair.b)
    rank, (num_out, num_in) = config.rank_of(pair.source), part.whole
    if rank > limits.max_rank:
        raise AdapterError(f"{pair.source} has rank {rank}; --max-lora-rank is {limits.max_rank}")
    for matrix, tensor, shape in (("A", a, [rank, num_in]), ("B", b, [num_out, rank])):
        name = f"{pair.source}.lora_{matrix}.weight"
        if list(tensor.shape) != shape:
            raise AdapterError(
                f"{name} has the shape {list(tensor.shape)}; the model and the configured rank "
                f"need {shape}"
            )
        if not tensor.is_floating_point():
            raise AdapterError(f"{name} is stored as {tensor.dtype}, not as numbers with a point")
    return a, b


def _converted(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """A contiguous copy in the slots' type. Raises AdapterError for NaN and infinite values."""
    converted = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if not bool(converted.float().isfinite().all()):
        raise AdapterError(f"{name} has values that are NaN, infinite or too large for {dtype}")
    return converted
