"""Weight files that are damaged or of another model are refused before a weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.oracle import checkpoint, loaded

from vlmserve.models.errors import ModelError
from vlmserve.models.weights import loader
from vlmserve.models.weights.device_map import given_map
from vlmserve.models.weights.formats.safetensors_headers import module_name, read_tensors
from vlmserve.models.weights.loader import load_model, open_checkpoint

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("tiny"), tmp_path / "checkpoint"))


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The tiny checkpoint in three shards with their index."""
    weights = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    shards = {f"model-0000{i + 1}-of-00003.safetensors": list(weights)[i::3] for i in range(3)}
    for file, names in shards.items():
        save_file({name: weights[name] for name in names}, folder / file, {"format": "pt"})
    placed = {name: file for file, names in shards.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


def use_todays_names(folder: Path) -> None:
    """Name the weights as the module does; `save_pretrained` writes the published names."""
    weights = load_file(folder / SINGLE)
    assert "language_model.model.norm.weight" in weights
    save_file({module_name(k): w for k, w in weights.items()}, folder / SINGLE, {"format": "pt"})


def test_headers_tell_every_tensor_of_the_files_by_its_name_in_the_module(sharded: Path) -> None:
    found = read_tensors(sharded)
    weights = open_checkpoint(sharded, torch.float32).meta_model.state_dict()
    assert {name: one.shape for name, one in found.items()} == {
        name: tuple(weight.shape) for name, weight in weights.items()
    }
    assert sum(one.num_bytes for one in found.values()) == sum(w.nbytes for w in weights.values())


def test_a_checkpoint_with_todays_names_loads_alike(folder: Path) -> None:
    use_todays_names(folder)
    model = load_model(folder, "cpu", "float32").model
    for name, weight in loaded("tiny").model.named_parameters():
        assert torch.equal(model.get_parameter(name), weight), name


@pytest.mark.parametrize("prepare", [lambda folder: None, use_todays_names])
def test_a_checkpoint_with_either_names_can_lie_on_disk(
    folder: Path, prepare: Callable[[Path], None]
) -> None:
    prepare(folder)
    opened = open_checkpoint(folder, torch.float32)
    model = loader.load(opened, given_map({"": "disk"}, opened.meta_model, 0, "map")).model
    ids = torch.tensor([[5]])
    assert model.model.language_model.embed_tokens(ids).equal(
        loaded("tiny").model.model.language_model.embed_tokens(ids)
    )


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def cut(folder: Path) -> None:
    data = first_shard(folder).read_bytes()
    first_shard(folder).write_bytes(data[:-1])


def lengthen(folder: Path) -> None:
    with open(first_shard(folder), "ab") as file:
        file.write(b"more")


def garble_header(folder: Path) -> None:
    data = bytearray(first_shard(folder).read_bytes())
    data[8:12] = b"\xff\xfe{{"
    first_shard(folder).write_bytes(data)


def lie_in_header(folder: Path) -> None:
    """The same length, but a tensor twice as wide as its bytes."""
    data = first_shard(folder).read_bytes()
    changed = data.replace(b'"dtype":"F32"', b'"dtype":"F64"', 1)
    assert changed != data
    first_shard(folder).write_bytes(changed)


def write_page(folder: Path) -> None:
    """What a proxy may leave in the place of a file."""
    first_shard(folder).write_text("<!DOCTYPE html><html><body>Sign in</body></html>")


def promise_more(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.vision_model.extra"] = first_shard(folder).name
    (folder / INDEX).write_text(json.dumps(index))


def swap_shards(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = max(folder.glob("*.safetensors")).name
    (folder / INDEX).write_text(json.dumps(index))


def forget_a_shard(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    gone = max(folder.glob("*.safetensors"))
    gone.unlink()
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != gone.name}
    (folder / INDEX).write_text(json.dumps(index))


def lose_a_shard(folder: Path) -> None:
    max(folder.glob("*.safetensors")).unlink()


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a shard that is cut short": (cut, r"is damaged: it is cut short \([\d,]+ bytes of [\d,]+\)"),
    "a shard that is too long": (lengthen, "is damaged: it is too long"),
    "a garbled header": (garble_header, "is damaged: its header is unreadable"),
    "a header that lies": (lie_in_header, "is damaged: its header is unreadable"),
    "a web page": (write_page, "is damaged: it is not a safetensors file"),
    "an index that promises more": (promise_more, "lists model.vision_model.extra in model-"),
    "an index that is wrong": (swap_shards, "which does not have it; download both again"),
    "an index without a shard": (forget_a_shard, r"\d+ weights are missing, .* among them"),
    "a shard that is gone": (lose_a_shard, "model-00003-of-00003.safetensors is missing"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_refused_in_one_line_before_a_weight_is_read(
    sharded: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, message = DAMAGE[what]
    damage(sharded)
    monkeypatch.setattr(loader, "_read_weights", lambda *args: pytest.fail("weights were read"))
    with pytest.raises(ModelError, match=message) as raised:
        load_model(sharded, "cpu", "float32")
    assert str(raised.value).startswith(str(sharded))
    assert "\n" not in str(raised.value)


LIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "width": ("text_config", {"intermediate_size": 97}, r"\[96, 64\], but config.json gives"),
    "vocabulary": ("text_config", {"vocab_size": 770}, "set text_config.vocab_size to 768"),
    "KV heads": ("text_config", {"num_key_value_heads": 4}, "but config.json gives"),
    "layers": ("text_config", {"num_hidden_layers": 7}, "num_hidden_layers 7 .* weights have 6"),
    "a million layers": (
        "text_config",
        {"num_hidden_layers": 10**9},
        "num_hidden_layers 1000000000 and the weights have 6",
    ),
    "vision layers": (
        "vision_config",
        {"num_hidden_layers": 2},
        "vision_config.num_hidden_layers 2 and the weights have 3",
    ),
    "cross layers": ("text_config", {"cross_attention_layers": [1, 3]}, "weights are missing"),
    "no heads": (
        "text_config",
        {"num_attention_heads": 0},
        "config.json does not describe a Mllama",
    ),
    "words": ("text_config", {"hidden_size": "wide"}, "config.json does not describe a Mllama"),
    "tiles": ("vision_config", {"image_size": 56}, "but config.json gives"),
}


@pytest.mark.parametrize("what", LIES)
def test_a_config_that_lies_about_shapes_is_refused_in_one_line(folder: Path, what: str) -> None:
    part, changes, message = LIES[what]
    config = json.loads((folder / "config.json").read_text())
    config[part] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message) as raised:
        load_model(folder, "cpu", "float32")
    assert str(raised.value).startswith(str(folder))
    assert "\n" not in str(raised.value)
