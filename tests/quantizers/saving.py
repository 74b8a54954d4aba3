"""Saves a model with the small files of the checkpoint that it comes from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any


def save(model: Any, source: Path, folder: Path, **options: Any) -> None:
    """Write the weights and config.json as transformers does, beside copies of the other files."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if not file.name.startswith("model") and file.is_file():
            shutil.copy(file, folder)
    model.save_pretrained(folder, **options)
