"""The small files of a checkpoint: each way to be broken is one line before anything starts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmserve.models.bundled import CHECKPOINT
from vlmserve.models.errors import ModelError
from vlmserve.models.weights.config_files import MAX_TOKENIZER_BYTES, check_config_files

FILES = ("config.json", "generation_config.json", "preprocessor_config.json",
         "tokenizer_config.json", "tokenizer.json")  # fmt: skip
NOT_JSON = {
    "empty": b"",
    "cut": b'{"text_config": {"hidden_size": 12',
    "a list": b"[]",
    "null": b"null",
    "no text": b"\xff\xfe\x00",
    "nested": b'{"model": ' + b"[" * 100_000,
}
WRONG: list[tuple[str, str, object, str]] = [
    ("config.json", "text_config", None, "text_config"),
    ("config.json", "text_config", {"hidden_size": "128"}, r"text_config\.hidden_size"),
    ("config.json", "text_config", {"num_hidden_layers": 0}, r"num_hidden_layers"),
    ("config.json", "text_config", {"max_position_embeddings": 1.5}, "max_position_embeddings"),
    ("config.json", "text_config", {"cross_attention_layers": [-1]}, "cross_attention_layers"),
    ("config.json", "vision_config", {"image_size": True}, r"vision_config\.image_size"),
    ("config.json", "vision_config", {"image_size": 1 << 40}, r"vision_config\.image_size"),
    ("generation_config.json", "eos_token_id", "stop", "eos_token_id"),
    ("generation_config.json", "eos_token_id", [1, None], "eos_token_id"),
    ("preprocessor_config.json", "size", {"height": 56}, "width"),
    ("preprocessor_config.json", "size", -1, "size"),
    ("preprocessor_config.json", "max_image_tiles", "4", "max_image_tiles"),
    ("preprocessor_config.json", "resample", 99, "resample"),
    ("preprocessor_config.json", "image_mean", [0.5, "x"], "image_mean"),
    ("tokenizer_config.json", "bos_token", 7, "bos_token"),
    ("tokenizer_config.json", "chat_template", 7, "chat_template"),
    ("tokenizer.json", "model", {}, "vocab"),
    ("tokenizer.json", "added_tokens", [{"content": "x"}], "id"),
    ("tokenizer.json", "added_tokens", [], r"no token <\|image\|>"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(CHECKPOINT, copy)
    return copy


def rejected(folder: Path, match: str) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        check_config_files(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_the_bundled_checkpoint_is_accepted(folder: Path):
    check_config_files(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", NOT_JSON)
def test_row_61_a_file_that_is_not_its_json_is_one_line(folder: Path, name: str, how: str):
    (folder / name).write_bytes(NOT_JSON[how])
    rejected(folder, name)


@pytest.mark.parametrize(("name", "field", "value", "match"), WRONG)
def test_row_61_a_field_of_a_wrong_type_or_out_of_range_is_named(
    folder: Path, name: str, field: str, value: object, match: str
):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | {field: value}))
    rejected(folder, match)


@pytest.mark.parametrize("field", ["text_config", "vision_config"])
def test_a_part_of_the_configuration_that_is_missing_is_named(folder: Path, field: str):
    content = json.loads((folder / "config.json").read_text())
    del content[field]
    (folder / "config.json").write_text(json.dumps(content))
    rejected(folder, field)


def test_a_tokenizer_of_a_gibibyte_is_not_read(folder: Path):
    """A sparse file: it has no content, but a reader would fill a gibibyte of memory."""
    os.truncate(folder / "tokenizer.json", 1 << 30)
    assert MAX_TOKENIZER_BYTES < (1 << 30)
    rejected(folder, r"tokenizer\.json has 1,073,741,824 bytes")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_link_out_of_the_folder_is_rejected(folder: Path, tmp_path: Path, name: str):
    shutil.move(folder / name, tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    rejected(folder, f"{name} is a link to .*elsewhere")


def test_links_inside_the_folder_and_inside_the_hubs_cache_are_accepted(tmp_path: Path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/123", tmp_path / "models--a--b/blobs"
    shutil.copytree(CHECKPOINT, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    check_config_files(snapshot)
    (snapshot / "tokenizer.json").unlink()
    (tmp_path / "other").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../../other")
    rejected(snapshot, "is a link to")


@pytest.mark.parametrize(
    "replace",
    [
        lambda file: file.mkdir(),
        lambda file: os.mkfifo(file),
        lambda file: file.symlink_to(file),
    ],
    ids=["a folder", "a pipe", "a link to itself"],
)
def test_what_is_not_a_file_is_not_read(folder: Path, replace: Callable[[Path], None]):
    """A pipe that has no writer would stop the start for ever."""
    (folder / "generation_config.json").unlink()
    replace(folder / "generation_config.json")
    rejected(folder, "generation_config")
