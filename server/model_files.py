"""Finds the folder of the model to serve: bundled, a local path, or a hub id.

Owns names and downloads. Knows nothing of what is in the weights; loading them
is the engine's work.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..models.bundled import CHECKPOINT

BUNDLED_NAME = "vlmserve-tiny-vision"
# Only what serving reads: no pickle weights, no code.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "LICENSE*"]


class ModelFilesError(Exception):
    """The model cannot be found or fetched; the message is one line for the operator."""


@dataclass(slots=True, frozen=True)
class ModelFolder:
    """Where a model's files lie and the name it is served under by default."""

    path: Path
    name: str


def resolve_model(
    model: str | None, revision: str | None = None, cache_dir: str | None = None
) -> ModelFolder:
    """The folder of `model`: None is the bundled one, else a local path or a hub id.

    A hub id is downloaded into the Hugging Face cache (HF_HOME, HF_TOKEN are
    honoured) or below cache_dir. Raises ModelFilesError with one line that says what to do.
    """
    if model is None:
        return ModelFolder(CHECKPOINT, BUNDLED_NAME)
    path = Path(model).expanduser()
    if path.is_dir():
        return _local_folder(path.resolve())
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelFilesError(
            f"no model at {model!r}: give a folder with config.json, or a hub id such as "
            "meta-llama/Llama-3.2-11B-Vision-Instruct"
        )
    return ModelFolder(_download(model, revision, cache_dir), model)


def _local_folder(path: Path) -> ModelFolder:
    if not (path / "config.json").is_file():
        raise ModelFilesError(f"{path} has no config.json: it is not a model folder")
    return ModelFolder(path, path.name)


def _download(hub_id: str, revision: str | None, cache_dir: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(
            hub_id, revision=revision, cache_dir=cache_dir, allow_patterns=HUB_PATTERNS
        )
        return Path(folder)
    except GatedRepoError as error:
        raise ModelFilesError(
            f"{hub_id} is gated: accept its licence on its page and set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelFilesError(f"{hub_id} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise ModelFilesError(
            f"the hub has no model {hub_id!r} (or it is private: set HF_TOKEN)"
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise ModelFilesError(
            f"cannot reach the hub for {hub_id}, and it is not in the cache: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
