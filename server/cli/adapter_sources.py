"""Finds the adapters of --lora: NAME=FOLDER, NAME=HUB_ID, or vLLM's JSON form.

Owns the forms and the download; the engine reads the weights.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from ...models.batch import AdapterRef
from ...models.errors import AdapterError
from ...models.lora.files import CONFIG, WEIGHTS, digest_of
from ..adapters.names import Given, parse
from ..adapters.settings import ServedAdapter
from .model_source import ModelFilesError, why_no_download


def find_adapters(
    values: Sequence[str], model_names: Iterable[str], cache_dir: str | None
) -> list[ServedAdapter]:
    """The adapters of all values of --lora. Raises ModelFilesError, one line with the remedy."""
    found: dict[str, ServedAdapter] = {}
    for value in values:
        try:
            given = parse(value)
        except ValueError as error:
            raise ModelFilesError(str(error)) from error
        if given.name in found or given.name in model_names:
            raise ModelFilesError(f"--lora {given.name}=...: this name is given twice: rename one")
        found[given.name] = _adapter(given, cache_dir)
    return list(found.values())


def _adapter(given: Given, cache_dir: str | None) -> ServedAdapter:
    path = Path(given.path).expanduser()
    is_hub_id = not path.exists() and given.path.count("/") == 1 and given.path[0] not in "./~"
    folder = _download(given.path, cache_dir) if is_hub_id else path.absolute()
    try:
        ref = AdapterRef(given.name, str(folder), digest_of(folder))
    except AdapterError as error:
        raise ModelFilesError(f"--lora {given.name}={given.path}: {error}") from error
    root = given.path if is_hub_id else folder.name
    return ServedAdapter(ref, root, int(time.time()), "start")


def _download(hub_id: str, cache_dir: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(hub_id, cache_dir=cache_dir, allow_patterns=[CONFIG, WEIGHTS])
    except Exception as error:  # errors of the hub's client, the network and the disk
        raise ModelFilesError(f"--lora: {why_no_download(hub_id, None, error)}") from error
    return Path(folder)
