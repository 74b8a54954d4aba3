"""Checks a checkpoint's folder before anything is loaded. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import ModelError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ARCHITECTURE = "MllamaForConditionalGeneration"
MERGE_REMEDY = "merge it into its base model (peft: merge_and_unload) and save that"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def check_folder(folder: Path) -> None:
    """Raise ModelError unless the folder has a Mllama checkpoint in safetensors."""
    check_no_adapter(folder)
    check_config(read_json(folder / "config.json"), str(folder))
    if (folder / SINGLE).is_file():
        return  # the index, if there is one, may be of an earlier save
    if not (folder / INDEX).is_file():
        _refuse_without_safetensors(folder)
    _check_shards(folder)


def check_no_adapter(folder: Path) -> None:
    """Raise ModelError for a folder of PEFT, which has an adapter's weights beside a base model's.

    transformers would download the base model, and read adapter weights of any format.
    """
    file = folder / "adapter_config.json"
    if file.exists():
        settings = read_json(file)
        kind, base = settings.get("peft_type"), settings.get("base_model_name_or_path")
        what = f"a {kind} adapter" if isinstance(kind, str) else "an adapter"
        of = f" of {base}" if isinstance(base, str) and base else ""
        is_whole = any((folder / name).is_file() for name in (SINGLE, INDEX))
        remedy = f"if the weights are merged, remove {file.name}" if is_whole else MERGE_REMEDY
        if kind == "LORA" and not is_whole:
            remedy = f"serve its base model with --lora NAME={folder}, or {remedy}"
        raise ModelError(f"{folder}: this is {what}{of}, not a model; {remedy}")


def check_no_gguf(path: Path) -> None:
    """Raise ModelError for a file in GGUF, or a folder that has one."""
    if path.suffix == ".gguf" or any(path.glob("*.gguf")):
        raise ModelError(
            f"{path}: the checkpoint is in GGUF, the format of llama.cpp and Ollama, which is "
            "not served; use the model's safetensors"
        )


def check_config(config: dict[str, Any], source: str) -> None:
    """Raise ModelError unless a config.json describes a Mllama.

    source: the folder or hub id, for messages.
    """
    architectures = config.get("architectures") or []
    if config.get("model_type") != "mllama" or architectures not in ([], [ARCHITECTURE]):
        names = architectures if isinstance(architectures, list) else [architectures]
        found = ", ".join(map(str, names)) or config.get("model_type") or "model of an unknown type"
        raise ModelError(f"{source}: the checkpoint is a {found}; only {ARCHITECTURE} is served")


def _check_shards(folder: Path) -> None:
    """Raise ModelError unless every shard of the index is a safetensors file of this folder."""
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelError(f"{folder}: {INDEX} lists no weights in weight_map; download it again")
    for name in sorted(set(map(str, shards.values()))):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{folder}: the index names {name!r}, not a safetensors file")
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: {name} is missing; download the checkpoint again")


def lacks_metadata(folder: Path) -> bool:
    """Whether the weights are shards whose index has no "metadata", as some tools write it."""
    is_sharded = (folder / INDEX).is_file() and not (folder / SINGLE).is_file()
    return is_sharded and not isinstance(read_json(folder / INDEX).get("metadata"), dict)


def _refuse_without_safetensors(folder: Path) -> None:
    check_no_gguf(folder)
    pickles = [file.name for pattern in _PICKLES for file in sorted(folder.glob(pattern))]
    if pickles:
        raise ModelError(
            f"{folder}: {pickles[0]} is a pickle file, which can run code, so it is not loaded; "
            "convert the weights to model.safetensors"
        )
    raise ModelError(f"{folder}: {SINGLE} is missing")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a checkpoint's file. Raises ModelError if it is missing or invalid."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file.parent}: {file.name} is missing: not a checkpoint") from None
    except RecursionError:
        raise ModelError(f"{file.parent}: {file.name} nests too deeply") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file.parent}: {file.name} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file.parent}: {file.name} is not a JSON object")
    return content
