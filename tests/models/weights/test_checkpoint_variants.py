"""What else checkpoints come with: names, dtypes, shards, vocabularies, files that are missing."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.coded_checkpoints import OLD_PREFIXES, set_config
from support.oracle import checkpoint
from torch import Tensor
from transformers import MllamaForConditionalGeneration

from vlmserve.models.checkpoint import check_folder
from vlmserve.models.eos_tokens import configured_end_ids
from vlmserve.models.errors import ModelError
from vlmserve.models.vision.encoder import read_normalization
from vlmserve.models.weights.loader import load_model
from vlmserve.server.cli.model_source import ModelFilesError, resolve_model

TINY = Path(checkpoint("tiny"))
WHOLE = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint."""
    return Path(shutil.copytree(TINY, tmp_path / "checkpoint"))


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / WHOLE, metadata={"format": "pt"})


def rename(folder: Path, new_name: Callable[[str], str]) -> None:
    write(folder, {new_name(name): one for name, one in load_file(folder / WHOLE).items()})


def today(name: str) -> str:
    for new, old in OLD_PREFIXES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def former(name: str) -> str:
    for new, old in OLD_PREFIXES.items():
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def weights(folder: Path, quantize: str | None = None) -> dict[str, Tensor]:
    model = load_model(folder, "cpu", "float32", quantize=quantize).model
    return model.state_dict()


@functools.cache
def tiny_weights(quantize: str | None = None) -> dict[str, Tensor]:
    return weights(TINY, quantize)


PREFIXES: dict[str, Callable[[str], str]] = {
    "today's": today,
    "of before transformers 4.52": lambda name: former(today(name)),
    "left from PEFT, today's": lambda name: f"base_model.model.{today(name)}",
    "left from PEFT, former": lambda name: f"base_model.model.{former(today(name))}",
}


@pytest.mark.parametrize(
    "quantize",
    [None, "int8", pytest.param("bitsandbytes", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("names", PREFIXES)
def test_every_prefix_of_names_loads_the_same_weights(folder, names, quantize) -> None:
    rename(folder, PREFIXES[names])
    found, expected = weights(folder, quantize), tiny_weights(quantize)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("quantize", [None, pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("dtype", "shard_size"),
    [(torch.float16, "1GB"), (torch.float16, "100KB"), (torch.bfloat16, "1GB"), (None, "100KB")],
)
def test_files_of_any_dtype_load_whole_or_in_shards(tmp_path, dtype, shard_size, quantize) -> None:
    model = MllamaForConditionalGeneration.from_pretrained(TINY, dtype=dtype or torch.float32)
    whole = tmp_path / "whole"
    model.float().save_pretrained(whole)
    model.to(dtype or torch.float32).save_pretrained(tmp_path / "stored", max_shard_size=shard_size)
    assert (tmp_path / "stored" / WHOLE).exists() == (shard_size == "1GB")
    found, expected = weights(tmp_path / "stored", quantize), weights(whole, quantize)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


INDEX = "model.safetensors.index.json"


def sharded(folder: Path, **index: Any) -> dict[str, str]:
    """Store the folder's weights in two shards, with these keys in their index; the weight map."""
    tensors = load_file(folder / WHOLE)
    names = list(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, listed in shards.items():
        save_file({name: tensors[name] for name in listed}, folder / file)
    (folder / WHOLE).unlink()
    weight_map = {name: file for file, listed in shards.items() for name in listed}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map} | index))
    return weight_map


@pytest.mark.parametrize("metadata", [None, {}, {"metadata": None}, {"metadata": [1]}])
def test_shards_load_whatever_the_metadata_of_their_index(folder, metadata) -> None:
    """transformers reads an index only with metadata that is an object."""
    sharded(folder, **(metadata if metadata is not None else {"metadata": {"total_size": 7}}))
    for quantize in (None, "int8"):
        found, expected = weights(folder, quantize), tiny_weights(quantize)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_shards_without_metadata_are_one_line_where_transformers_reads_them(folder) -> None:
    sharded(folder)
    with pytest.raises(ModelError, match=r'has no metadata, .*; or add "metadata": \{\}') as error:
        load_model(folder, "cpu", "float32", quantize="bitsandbytes")
    assert "\n" not in str(error.value)
    sharded_index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(sharded_index | {"metadata": {}}))
    load_model(folder, "cpu", "float32", quantize="bitsandbytes")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda names: {}, "lists no weights in weight_map"),
        (lambda names: names | {"x.weight": "c.safetensors"}, "c.safetensors is missing"),
        (lambda names: names | {"x.weight": "a.safetensors"}, "lists x.weight in a.safetensors"),
        (lambda names: dict.fromkeys(names, 3), "names '3', not a safetensors file"),
        (lambda names: dict.fromkeys(names, "a.safetensors"), "which does not have it"),
        (lambda names: [*names], "lists no weights in weight_map"),
    ],
    ids=["empty", "absent shard", "extra name", "a number", "another shard", "a list"],
)
def test_an_index_that_does_not_fit_its_shards_is_one_line(folder, change, words) -> None:
    weight_map = sharded(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": change(weight_map)}))
    with pytest.raises(ModelError, match=re.escape(words)) as error:
        load_model(folder, "cpu", "float32")
    assert "\n" not in str(error.value)


def test_newer_shards_beside_a_whole_file_are_ignored_by_every_loader(folder, tmp_path) -> None:
    """The whole file counts for every loader, and the newer shards beside it for none."""
    model = MllamaForConditionalGeneration.from_pretrained(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    for file in (tmp_path / "shards").glob("model*"):
        shutil.copy(file, folder)
    for quantize in (None, "int8", "bitsandbytes"):
        found, expected = weights(folder, quantize), tiny_weights(quantize)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_weight_under_two_names_is_one_line_with_its_files(folder) -> None:
    tensors = load_file(folder / WHOLE)
    name = next(name for name in tensors if "norm" in name)
    write(folder, tensors | {former(today(name)): tensors[name], today(name): tensors[name] * 2})
    with pytest.raises(ModelError, match=r"is twice in model\.safetensors, under an old and a new"):
        weights(folder)


def test_a_whole_file_without_all_weights_beside_an_index_is_one_line_with_both(folder) -> None:
    tensors = load_file(folder / WHOLE)
    save_file(dict(list(tensors.items())[:20]), folder / WHOLE, metadata={"format": "pt"})
    save_file(tensors, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"the weights have 2.*safetensors\.index\.json") as error:
        load_model(folder, "cpu", "float32")
    assert "\n" not in str(error.value)


def test_an_adapter_that_is_not_merged_is_named(folder) -> None:
    layer = "layers.0.self_attn.q_proj"
    tensors = {}
    for name, one in load_file(folder / WHOLE).items():
        name = f"base_model.model.{name}"
        tensors[name.replace(f"{layer}.weight", f"{layer}.base_layer.weight")] = one
        if name.endswith(f"{layer}.weight"):
            path = name.removesuffix(".weight")
            tensors[f"{path}.lora_A.default.weight"] = torch.zeros(4, one.shape[1])
            tensors[f"{path}.lora_B.default.weight"] = torch.zeros(one.shape[0], 4)
    write(folder, tensors)
    with pytest.raises(ModelError, match=r"LoRA adapter that is not merged .*merge_and_unload"):
        load_model(folder, "cpu", "float32")


EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


def resized(folder: Path, rows: int, head: int, vocab_size: int) -> dict[str, Tensor]:
    rename(folder, today)
    tensors = load_file(folder / WHOLE)
    for name, size in ((EMBEDDING, rows), (HEAD, head)):
        more = torch.ones(max(0, size - len(tensors[name])), tensors[name].shape[1])
        tensors[name] = torch.cat((tensors[name], more))[:size].clone()
    write(folder, tensors)
    config = json.loads((folder / "config.json").read_text())
    set_config(folder, text_config=config["text_config"] | {"vocab_size": vocab_size})
    return tensors


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize(("rows", "head"), [(800, 792), (792, 792)])
def test_a_resized_vocabulary_loads(folder, rows, head, quantize) -> None:
    """transformers' resize_token_embeddings makes both as long; a fresh model's has 8 rows more."""
    tensors = resized(folder, rows, head, head)
    found = weights(folder, quantize)
    assert torch.equal(found[HEAD], tensors[HEAD])
    assert torch.equal(found[EMBEDDING][:rows], tensors[EMBEDDING])
    assert not found[EMBEDDING][rows:].any()
    assert len(found[EMBEDDING]) == 800


def test_a_resized_vocabulary_goes_with_one_device_only(folder) -> None:
    resized(folder, 792, 792, 792)
    with pytest.raises(ModelError, match=r"vocabulary was resized, which works on one device only"):
        load_model(folder, "cpu", "float32", quantize="bitsandbytes")


@pytest.mark.parametrize(
    ("rows", "head", "vocab_size"), [(800, 792, 768), (768, 768, 768), (776, 792, 768)]
)
def test_a_vocabulary_that_does_not_fit_is_one_line(folder, rows, head, vocab_size) -> None:
    resized(folder, rows, head, vocab_size)
    with pytest.raises(ModelError, match="rows") as error:
        load_model(folder, "cpu", "float32")
    assert "\n" not in str(error.value)


# --- small files that are missing -----------------------------------------------------------------


def test_without_a_processors_file_pictures_are_normalized_as_the_published_model_s(folder) -> None:
    """It was transformers' default for missing values, a mean and deviation of 0.5."""
    expected = read_normalization(folder)
    assert expected.mean == (0.48145466, 0.4578275, 0.40821073)
    (folder / "preprocessor_config.json").unlink()
    assert read_normalization(folder) == expected
    assert load_model(folder, "cpu", "float32").normalization == expected


def test_a_newer_processors_file_counts_before_the_older_one(folder) -> None:
    """As transformers reads them, and as the tile size is read."""
    newer = {"image_processor": {"image_mean": [0.1, 0.2, 0.3]}}
    (folder / "processor_config.json").write_text(json.dumps(newer))
    assert read_normalization(folder).mean == (0.1, 0.2, 0.3)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "M"}))
    assert read_normalization(folder).mean == (0.48145466, 0.4578275, 0.40821073)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [1, 2]}, {"text_config": {"eos_token_id": 3}}, [1, 2]),
        ({"eos_token_id": 1}, {"eos_token_id": 3}, [1]),
        ({}, {"text_config": {"eos_token_id": [3, 4]}, "eos_token_id": 5}, [3, 4]),
        (None, {"text_config": {"eos_token_id": 3}}, [3]),
        (None, {"text_config": {}, "eos_token_id": 5}, [5]),
        (None, {}, []),
    ],
)
def test_without_a_generation_config_the_configurations_end_tokens_count(
    tmp_path, generation, config, expected
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert configured_end_ids(tmp_path) == expected


# --- adapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_config", [False, True])
def test_a_folder_of_an_adapter_is_named_with_its_base_model(tmp_path, has_config) -> None:
    settings = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    if has_config:
        shutil.copy(TINY / "config.json", tmp_path)
    expected = r"LORA adapter of meta-llama/base, not a model; serve .* --lora NAME=.* or merge it"
    with pytest.raises(ModelError, match=expected):
        check_folder(tmp_path)
    with pytest.raises(ModelFilesError, match=expected):
        resolve_model(str(tmp_path))


def test_whole_weights_beside_an_adapters_settings_say_which_file_to_remove(folder) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"weights are merged, remove adapter_config\.json"):
        check_folder(folder)
