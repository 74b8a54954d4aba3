"""Finds the folder of the model to serve: bundled, a local path, or a hub id.

Owns names and downloads; the engine loads the weights.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path

from ...models.bundled import CHECKPOINT
from ...models.checkpoint import check_folder, check_no_adapter, check_no_gguf, read_json
from ...models.errors import ModelError
from ...models.weights.config_files import check_config_files
from ...models.weights.formats.recognition import check_hub_config, read_weights

BUNDLED_NAME = "vlmserve-tiny-vision"
# Only files that serving reads: no pickle weights, no code.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "LICENSE*"]
UNAUTHORIZED = 401


class ModelFilesError(Exception):
    """The model cannot be found or downloaded; the message is one line for the operator."""


@dataclass(slots=True, frozen=True)
class ModelFolder:
    """The folder of a model's files, and its default name in the API."""

    path: Path
    name: str


def resolve_model(
    model: str | None, revision: str | None = None, cache_dir: str | None = None
) -> ModelFolder:
    """The folder of `model`: None is the bundled one, else a local path or a hub id.

    Downloads a hub id into the Hugging Face cache (HF_HOME, HF_TOKEN) or below cache_dir. Checks
    its config.json first, so that the weights of an unsupported architecture are not downloaded.
    Raises ModelFilesError, one line with the remedy.
    """
    path = None if model is None else Path(model).expanduser()
    is_hub_id = path is not None and not path.is_dir()
    if revision is not None and not is_hub_id:
        what = "the bundled model" if model is None else f"the folder {model}"
        raise ModelFilesError(f"--revision {revision} goes with a hub id, not with {what}")
    if model is None or path is None:
        return ModelFolder(CHECKPOINT, BUNDLED_NAME)
    if path.is_dir():
        return _local_folder(path.resolve())
    _check_other_form(path)
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelFilesError(
            f"no model at {model!r}: give a folder with config.json, or a hub id such as "
            "meta-llama/Llama-3.2-11B-Vision-Instruct"
        )
    return ModelFolder(_download(model, revision, cache_dir), model)


def _local_folder(path: Path) -> ModelFolder:
    if not (path / "config.json").is_file():
        _check_other_form(path)
        raise ModelFilesError(f"{path} has no config.json: it is not a model folder")
    _check_files(path)
    return ModelFolder(path, path.name)


def _check_other_form(path: Path) -> None:
    """Raises ModelFilesError for what has no config.json and is known: an adapter, GGUF."""
    try:
        check_no_adapter(path)
        check_no_gguf(path)
    except ModelError as error:
        raise ModelFilesError(_first_line(error)) from error


def _check_files(path: Path) -> None:
    """Raises ModelFilesError for files that the engine or a worker would reject later."""
    try:
        check_folder(path)
        check_config_files(path)
        read_weights(path)
    except ModelError as error:
        raise ModelFilesError(_first_line(error)) from error
    except OSError as error:
        raise ModelFilesError(f"{path} cannot be read: {error}") from error


def _download(hub_id: str, revision: str | None, cache_dir: str | None) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        config = hf_hub_download(hub_id, "config.json", revision=revision, cache_dir=cache_dir)
        check_hub_config(read_json(Path(config)), hub_id)
        folder = Path(
            snapshot_download(
                hub_id, revision=revision, cache_dir=cache_dir, allow_patterns=HUB_PATTERNS
            )
        )
    except ModelError as error:
        raise ModelFilesError(_first_line(error)) from error
    except Exception as error:  # errors of the hub's client, the network and the disk
        raise ModelFilesError(why_no_download(hub_id, revision, error)) from error
    if not any(folder.glob("*.safetensors")):
        raise ModelFilesError(
            f"{hub_id} has no weights in safetensors; pickle weights can run code and are never "
            "loaded"
        )
    _check_files(folder)
    return folder


def why_no_download(hub_id: str, revision: str | None, error: Exception) -> str:
    """The cause of a failed download and the remedy, in one line."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return f"{hub_id} is gated: accept its licence on its page and set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{hub_id} has no revision {revision!r}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no model {hub_id!r} (or it is private: set HF_TOKEN)"
    if isinstance(error, errors.HFValidationError):
        return f"{hub_id!r} is not a hub id: {_first_line(error)}"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"{hub_id} has no config.json: it is not a model, or an adapter or GGUF"
    if status == UNAUTHORIZED:
        return f"the hub rejects the token in HF_TOKEN for {hub_id}: create a new token"
    if status is not None:
        return f"the hub answers {status} for {hub_id}: {_first_line(error)}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no room on disk for {hub_id}: free some, or set HF_HOME to a larger one"
    if isinstance(error, PermissionError):
        return f"{hub_id} cannot be written to the cache: {_first_line(error)}; set HF_HOME"
    return f"cannot reach the hub for {hub_id}, and it is not in the cache: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0]
