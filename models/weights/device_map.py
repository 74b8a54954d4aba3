"""Decides where each part of the model is stored and where it computes.

Owns device maps: their syntax and files, the parts that may not be split, and the automatic maps.

A map names parts, which are never split:

    model.vision_model                    whole: its states stay on one device
    model.multi_modal_projector
    model.language_model.embed_tokens
    model.language_model.layers.0 ...     one decoder layer each, with its keys and values
    model.language_model.norm
    model.language_model.rotary_emb
    lm_head

"cpu" beside GPUs, and "disk" anywhere, only store weights. accelerate's hooks copy them to the main
device, the first GPU or else the CPU, while the part computes.
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
    """Where every part is stored. single: the device, if all parts are on one.

    `single` is None for a model in several places; then `places` has at least two values, or disk.
    """

    places: Mapping[str, Place]
    single: torch.device | None = None

    @property
    def device_map(self) -> dict[str, Any]:
        """What transformers takes as its `device_map`."""
        return {"": self.single} if self.single is not None else dict(self.places)

    @property
    def main(self) -> torch.device:
        """The device that computes the offloaded parts."""
        if self.single is not None:
            return self.single
        gpus = sorted(place for place in set(self.places.values()) if isinstance(place, int))
        return torch.device("cuda", gpus[0]) if gpus else torch.device("cpu")

    def device_of(self, part: str) -> torch.device:
        """The device that computes a part."""
        place = self.places[part]
        if self.single is not None or place in (CPU, DISK):
            return self.main
        return device_at(place)

    def holds(self, device: torch.device, part: str) -> bool:
        """Whether a part's weights stay on a device."""
        if self.single is not None:
            return device == self.single
        return self.places[part] != DISK and device_at(self.places[part]) == device

    def layer_devices(self) -> list[torch.device]:
        """The device of each decoder layer, and so of its keys and values."""
        prefix = f"{TEXT}.layers."
        return [self.device_of(part) for part in self.places if part.startswith(prefix)]

    def devices(self) -> list[torch.device]:
        """The devices that compute, the main one first."""
        found = dict.fromkeys([self.main, *(self.device_of(part) for part in self.places)])
        return list(found)

    def holders(self) -> list[torch.device]:
        """The devices that compute, and the CPU if it stores offloaded weights."""
        storing = [torch.device("cpu")] if CPU in self.places.values() else []
        return list(dict.fromkeys([*self.devices(), *storing]))

    @property
    def is_offloaded(self) -> bool:
        """Whether some weights are stored where they do not compute."""
        return any(self.is_offloaded_part(part) for part in self.places)

    def is_offloaded_part(self, part: str) -> bool:
        """Whether a part's weights are copied to its device only to compute."""
        place = self.places[part]
        return place == DISK or (place == CPU and self.main.type != "cpu")


def device_at(place: Place) -> torch.device:
    """The device of a place other than disk."""
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


def parts_of(meta_model: nn.Module) -> list[str]:
    """The model's parts, in the order in which they compute; see the module's list."""
    children = meta_model.get_submodule(f"{TEXT}.layers").named_children()
    layers = [f"{TEXT}.layers.{name}" for name, _ in children]
    return [VISION, PROJECTOR, EMBEDDING, f"{TEXT}.rotary_emb", *layers, f"{TEXT}.norm", HEAD]


def on_one_device(meta_model: nn.Module, device: torch.device) -> Placement:
    """Everything on one device."""
    place: Place = device.index or 0 if device.type == "cuda" else device.type
    return Placement(dict.fromkeys(parts_of(meta_model), place), single=device)


def read_device_map(file: Path, meta_model: nn.Module, num_gpus: int) -> Placement:
    """The placement of a JSON file: names of modules -> a GPU's number, "cpu" or "disk".

    A name covers all parts below it; the longest matching name wins, and "" matches all. Raises
    ModelError, one line, for unknown names and places, and for a name inside a part.
    """
    if not file.is_file():
        raise ModelError(
            f"--device-map {str(file)!r} is neither auto, balanced nor a file: write a JSON "
            'file such as {"": 0, "model.language_model.layers.39": "cpu"}'
        )
    return given_map(read_json(file), meta_model, num_gpus, str(file))


def given_map(
    entries: Mapping[str, Any], meta_model: nn.Module, num_gpus: int, source: str
) -> Placement:
    """The placement of these entries; see `read_device_map`."""
    parts = parts_of(meta_model)
    known = {name for name, _ in meta_model.named_modules()}
    for name in entries:
        if name not in known:
            raise ModelError(f"{source}: the model has no module {name!r}")
        if whole := next((part for part in parts if name.startswith(f"{part}.")), None):
            raise ModelError(f"{source}: {name} splits {whole}, which must stay whole: name it")
    places = {name: _place(value, num_gpus, source) for name, value in entries.items()}
    return settled({part: _longest(part, places, source) for part in parts})


def settled(places: Mapping[str, Place]) -> Placement:
    """The placement of these parts; `single` if all are on one computing device."""
    found = set(places.values())
    if len(found) > 1 or DISK in found:
        return Placement(places)
    place = found.pop()
    return Placement(places, device_at(place))


def _longest(part: str, places: Mapping[str, Place], source: str) -> Place:
    above = [name for name in places if name in ("", part) or part.startswith(f"{name}.")]
    if not above:
        raise ModelError(f'{source}: {part} has no place: add it, or "" for all other parts')
    return places[max(above, key=len)]


def _place(value: Any, num_gpus: int, source: str) -> Place:
    if value in (CPU, DISK) and isinstance(value, str):
        return str(value)
    number = value
    if isinstance(value, str):
        number = value.removeprefix("cuda:")
        number = int(number) if number.isdecimal() else None
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ModelError(f"{source}: {value!r} is not a place: use a GPU number, cpu or disk")
    if number >= num_gpus:
        raise ModelError(f"{source}: GPU {number} does not exist ({num_gpus} CUDA devices)")
    return number


def automatic(
    kind: str,
    sizes: Mapping[str, int],
    available: Mapping[Place, int],
    cache_bytes: Mapping[str, int],
) -> Placement:
    """The placement that fills devices in the order of `available`: GPUs, the CPU, then disk.

    kind: "auto" uses one GPU if the model fits it, else spreads evenly; "balanced" always spreads.
    sizes: bytes of each part's weights. available: bytes of each place for weights and caches.
    cache_bytes: the least bytes of a part's keys and values.
    """
    gpus = [place for place in available if isinstance(place, int)]
    computing: list[Place] = list(gpus) or [CPU]
    needs = {part: size + cache_bytes.get(part, 0) for part, size in sizes.items()}
    if kind == AUTO:
        for place in computing:
            if sum(needs.values()) <= available.get(place, 0):
                return settled(dict.fromkeys(sizes, place))
    most = sum(needs.values()) // len(computing) + max(needs.values())
    even = {place: min(available.get(place, 0), most) for place in computing}
    for limits in (even, {place: available.get(place, 0) for place in computing}):
        if (places := _in_order(needs, limits)) is not None:
            return settled(places)
    return settled(_offloaded(sizes, cache_bytes, available, computing))


def _in_order(needs: Mapping[str, int], limits: Mapping[Place, int]) -> dict[str, Place] | None:
    """Each part on the first place with space, in order; None if a part does not fit."""
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
    available: Mapping[Place, int],
    computing: Sequence[Place],
) -> dict[str, Place]:
    """Parts stay where they compute while they fit; the rest go to the CPU and to disk.

    The main device reserves space for the largest offloaded part and for all caches.
    """
    reserved = max(sizes.values()) + sum(cache_bytes.values())
    limits = {place: available.get(place, 0) for place in computing}
    limits[computing[0]] -= reserved
    if CPU not in computing:
        limits[CPU] = available.get(CPU, 0)
    limits[DISK] = sum(sizes.values())
    places = _in_order(sizes, limits)
    assert places is not None, "the disk takes all that is left"
    return places
