"""The products of a model that adapters can change, and their sizes on one rank.

A site is one product: a linear layer, or several that read the same states and are joined in the
decoder's product of them. A layer is a part of its site.

    A  [rank, in]    the layers' A matrices one below the other
    B  [rank, out]   block-diagonal: a layer's B^T beside its own A and at its own outputs

So that one product with A and one with B give all parts' changes, side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import MllamaConfig

from ..decoder.decoder import is_fused
from ..tensor_parallel.layers import SummedLinear
from ..tensor_parallel.plan import HEAD, Side, rank_slice
from ..weights.device_map import PROJECTOR, TEXT, VISION
from ..weights.loader import LoadedModel
from ..weights.meta_model import empty_model
from ..weights.tensor_loader import RankShare

# layers of one decoder layer whose products the decoder joins
JOINED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("cross_attn.k_proj", "cross_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)
_IMAGE_KEYS = ("cross_attn.k_proj", "cross_attn.v_proj")


@dataclass(slots=True, frozen=True)
class Part:
    """One linear layer of a site. name: in the module; begin, num_out: its outputs on this rank.

    whole: the shape [out, in] of its weight on all ranks. side: along which ranks share it.
    """

    name: str
    begin: int
    num_out: int
    whole: tuple[int, int]
    side: Side | None = None

    def slice_of(self, side: Side, share: RankShare) -> slice:
        """The rank's inputs or outputs among those of all ranks."""
        length = self.whole[side]
        return rank_slice(length, share.rank, share.size) if self.side is side else slice(length)


@dataclass(slots=True, frozen=True, eq=False)
class Site:
    """One product. target: the decoder's product, or a module that is not joined.

    num_in: inputs on this rank. device: where the product is computed.
    """

    parts: tuple[Part, ...]
    num_in: int
    target: nn.Module
    device: torch.device

    @property
    def num_out(self) -> int:
        """Outputs on this rank, of all parts."""
        return sum(part.num_out for part in self.parts)

    @property
    def is_of_vision(self) -> bool:
        """Whether it is in the vision encoder or the projector."""
        return self.parts[0].name.startswith((VISION, PROJECTOR))

    @property
    def reads_images(self) -> bool:
        """Whether image blocks depend on it: it is of vision, or keys and values of images."""
        return self.is_of_vision or self.parts[0].name.endswith(_IMAGE_KEYS)


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The shape [out, in] of every linear layer but the head, by name. model: on all ranks."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != HEAD
    }


def groups_of(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The layers of each site in a decoder with joined products."""
    known = set(names)
    for name in names:
        group = next((group for group in JOINED if name.endswith(tuple(group))), None)
        prefix = None if group is None else name.removesuffix(_suffix(name, group))
        if group is None or prefix is None or not name.startswith(f"{TEXT}."):
            yield (name,)
        elif name == prefix + group[0]:
            yield tuple(prefix + one for one in group if prefix + one in known)


def _suffix(name: str, group: Sequence[str]) -> str:
    return next(one for one in group if name.endswith(one))


def sites_of(loaded: LoadedModel) -> list[Site]:
    """The sites of a loaded model, in the order in which they compute."""
    shapes = linear_shapes(empty_model(cast(MllamaConfig, loaded.model.config), loaded.dtype))
    text: Any = loaded.model.model.language_model
    products: dict[tuple[str, ...], nn.Module] = {}
    if is_fused(text):
        layers: list[Any] = list(text.layers)
        for index, layer in enumerate(layers):
            prefix = f"{TEXT}.layers.{index}."
            for names, product in layer.products().items():
                products[tuple(prefix + name for name in names)] = product
    groups = list(groups_of(list(shapes))) if products else [(name,) for name in shapes]
    modules = {names: _module(loaded.model, names[0]) for names in groups if names not in products}
    return [_site(names, (products | modules)[names], shapes, loaded) for names in groups]


def _module(model: nn.Module, name: str) -> nn.Module:
    """The layer's module whose products may be changed, before they are summed over ranks."""
    module = model.get_submodule(name)
    return module.inner if isinstance(module, SummedLinear) else module


def _site(
    names: Sequence[str],
    target: nn.Module,
    shapes: Mapping[str, tuple[int, int]],
    loaded: LoadedModel,
) -> Site:
    share, parts, begin = loaded.share, [], 0
    for name in names:
        side, whole = share.sides.get(name), shapes[name]
        num_out = whole[0] // share.size if side is Side.OUT else whole[0]
        parts.append(Part(name, begin, num_out, whole, side))
        begin += num_out
    first = parts[0]
    num_in = first.whole[1] // share.size if first.side is Side.IN else first.whole[1]
    return Site(tuple(parts), num_in, target, loaded.placement.device_of(part_of(names[0])))


def part_of(name: str) -> str:
    """The part of a device map that a layer is in."""
    if name.startswith(f"{VISION}."):
        return VISION
    if name.startswith(PROJECTOR):
        return PROJECTOR
    return ".".join(name.split(".")[:4])  # model.language_model.layers.N
