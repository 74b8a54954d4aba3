"""Decides which device each part of the model lies on and which it computes on.

Owns device maps: their words, their files, what may not be split, and the automatic ones. Knows
nothing of how weights are read or of how a step is computed; how much memory a device has is told.

A map names parts, the pieces that are never split:

    model.vision_model                    whole: its states cross no device between its layers
    model.multi_modal_projector
    model.language_model.embed_tokens
    model.language_model.layers.0 ...     a decoder layer each; its keys and values lie where it
    model.language_model.norm             computes
    model.language_model.rotary_emb
    lm_head

"cpu" beside GPUs, and "disk" anywhere, only keep weights: accelerate's hooks bring them to the main
device, the first GPU or else the CPU, for as long as the part computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import read_json
from ..errors import ModelError

AUTO, BALANCED = "auto", "balanced"
VISION = "model.vision_model"
PROJECTOR = "model.multi_modal_projector"
TEXT = "model.language_model"
EMBEDDING = f"{TEXT}.embed_tokens"
HEAD = "lm_head"
# accelerate's words: the number of a GPU, or one of these
Place = int | str
CPU, DISK = "cpu", "disk"


@dataclass(slots=True, frozen=True)
class Placement:
    """Where every part lies: `places` of all parts, and the one device where all lie on it.

    `single` is None for a model in several places; then `places` holds at least two, or disk.
    """

    places: Mapping[str, Place]
    single: torch.device | None = None

    @property
    def device_map(self) -> dict[str, Any]:
        """What transformers takes as its `device_map`."""
        return {"": self.single} if self.single is not None else dict(self.places)

    @property
    def main(self) -> torch.device:
        """Where parts compute that lie where nothing computes."""
        if self.single is not None:
            return self.single
        gpus = sorted(place for place in set(self.places.values()) if isinstance(place, int))
        return torch.device("cuda", gpus[0]) if gpus else torch.device("cpu")

    def device_of(self, part: str) -> torch.device:
        """Where a part computes."""
        place = self.places[part]
        if self.single is not None or place in (CPU, DISK):
            return self.main
        return device_at(place)

    def holds(self, device: torch.device, part: str) -> bool:
        """Whether a part's weights lie on a device all the time."""
        if self.single is not None:
            return device == self.single
        return self.places[part] != DISK and device_at(self.places[part]) == device

    def layer_devices(self) -> list[torch.device]:
        """Where each decoder layer computes, and so where its keys and values lie."""
        prefix = f"{TEXT}.layers."
        return [self.device_of(part) for part in self.places if part.startswith(prefix)]

    def devices(self) -> list[torch.device]:
        """The devices that compute, the main one first."""
        found = dict.fromkeys([self.main, *(self.device_of(part) for part in self.places)])
        return list(found)

    def holders(self) -> list[torch.device]:
        """The devices that compute, and the CPU where it only keeps weights."""
        keeping = [torch.device("cpu")] if CPU in self.places.values() else []
        return list(dict.fromkeys([*self.devices(), *keeping]))

    @property
    def is_offloaded(self) -> bool:
        """Whether some weights lie where they do not compute."""
        return any(self.is_offloaded_part(part) for part in self.places)

    def is_offloaded_part(self, part: str) -> bool:
        """Whether a part's weights come only to compute."""
        place = self.places[part]
        return place == DISK or (place == CPU and self.main.type != "cpu")


def device_at(place: Place) -> torch.device:
    """The device of a place that is not disk."""
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


def parts_of(skeleton: nn.Module) -> list[str]:
    """The model's parts, in the order in which they compute; see the module's list."""
    children = skeleton.get_submodule(f"{TEXT}.layers").named_children()
    layers = [f"{TEXT}.layers.{name}" for name, _ in children]
    return [VISION, PROJECTOR, EMBEDDING, f"{TEXT}.rotary_emb", *layers, f"{TEXT}.norm", HEAD]


def on_one_device(skeleton: nn.Module, device: torch.device) -> Placement:
    """Everything on one device."""
    place: Place = device.index or 0 if device.type == "cuda" else device.type
    return Placement(dict.fromkeys(parts_of(skeleton), place), single=device)


def read_device_map(file: Path, skeleton: nn.Module, num_gpus: int) -> Placement:
    """The placement of a JSON file: names of modules -> a GPU's number, "cpu" or "disk".

    A name stands for all parts below it; the longest that fits counts, and "" for the rest. Raises
    ModelError, one line, for names and places that do not exist and for a part that it splits.
    """
    if not file.is_file():
        raise ModelError(
            f"--device-map {str(file)!r} is neither auto nor balanced, nor a file: write a JSON "
            'file such as {"": 0, "model.language_model.layers.39": "cpu"}'
        )
    return given_map(read_json(file), skeleton, num_gpus, str(file))


def given_map(
    entries: Mapping[str, Any], skeleton: nn.Module, num_gpus: int, source: str
) -> Placement:
    """The placement that entries ask for; see `read_device_map`."""
    parts = parts_of(skeleton)
    known = {name for name, _ in skeleton.named_modules()}
    for name in entries:
        if name not in known:
            raise ModelError(f"{source}: the model has no module {name!r}")
        if whole := next((part for part in parts if name.startswith(f"{part}.")), None):
            raise ModelError(f"{source}: {name} splits {whole}, which stays whole: name that one")
    places = {name: _place(value, num_gpus, source) for name, value in entries.items()}
    return settled({part: _longest(part, places, source) for part in parts})


def settled(places: Mapping[str, Place]) -> Placement:
    """The placement of all parts; on one device where they all lie on one that computes."""
    found = set(places.values())
    if len(found) > 1 or DISK in found:
        return Placement(places)
    place = found.pop()
    return Placement(places, device_at(place))


def _longest(part: str, places: Mapping[str, Place], source: str) -> Place:
    above = [name for name in places if name in ("", part) or part.startswith(f"{name}.")]
    if not above:
        raise ModelError(f'{source}: nothing says where {part} lies: add it, or "" for the rest')
    return places[max(above, key=len)]


def _place(value: Any, num_gpus: int, source: str) -> Place:
    if value in (CPU, DISK) and isinstance(value, str):
        return str(value)
    number = value
    if isinstance(value, str):
        number = value.removeprefix("cuda:")
        number = int(number) if number.isdecimal() else None
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ModelError(f"{source}: {value!r} is no place: use a GPU's number, cpu or disk")
    if number >= num_gpus:
        raise ModelError(f"{source}: GPU {number} is not there ({num_gpus} CUDA devices)")
    return number


def automatic(
    kind: str,
    sizes: Mapping[str, int],
    room: Mapping[Place, int],
    cache_bytes: Mapping[str, int],
) -> Placement:
    """The placement that fills devices in the order of `room`: GPUs, then the CPU, then disk.

    kind: "auto" takes one GPU where the model fits it, else spreads evenly, as "balanced" always
    does. sizes: weights' bytes of each part. room: bytes of each place for weights and caches.
    cache_bytes: what a part's keys and values take at least where it computes.
    Raises ModelError where the main device cannot take what must compute there.
    """
    gpus = [place for place in room if isinstance(place, int)]
    computing: list[Place] = list(gpus) or [CPU]
    needs = {part: size + cache_bytes.get(part, 0) for part, size in sizes.items()}
    if kind == AUTO:
        for place in computing:
            if sum(needs.values()) <= room.get(place, 0):
                return settled(dict.fromkeys(sizes, place))
    share = sum(needs.values()) // len(computing) + max(needs.values())
    even = {place: min(room.get(place, 0), share) for place in computing}
    for limits in (even, {place: room.get(place, 0) for place in computing}):
        if (places := _in_order(needs, limits)) is not None:
            return settled(places)
    return settled(_offloaded(sizes, cache_bytes, room, computing))


def _in_order(needs: Mapping[str, int], limits: Mapping[Place, int]) -> dict[str, Place] | None:
    """Each part on the first place that is not full, never going back; None if some find none."""
    places: dict[str, Place] = {}
    order = iter(limits)
    place: Place | None = next(order, None)
    left = 0 if place is None else limits[place]
    for part, need in needs.items():
        while place is not None and need > left:
            place = next(order, None)
            left = 0 if place is None else limits[place]
        if place is None:
            return None
        places[part] = place
        left -= need
    return places


def _offloaded(
    sizes: Mapping[str, int],
    cache_bytes: Mapping[str, int],
    room: Mapping[Place, int],
    computing: Sequence[Place],
) -> dict[str, Place]:
    """What fits where it computes, the rest on the CPU and on disk.

    The main device keeps room for the largest part that visits it and, as visitors' caches lie
    there, for the caches of all.
    """
    visitors = max(sizes.values()) + sum(cache_bytes.values())
    limits = {place: room.get(place, 0) for place in computing}
    limits[computing[0]] -= visitors
    if CPU not in computing:
        limits[CPU] = room.get(CPU, 0)
    limits[DISK] = sum(sizes.values())
    places = _in_order(sizes, limits)
    assert places is not None, "the disk takes what nothing else does"
    return places
