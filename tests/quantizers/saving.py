"""Saves a model with the small files of its checkpoint; a tool's command line."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def save(model: Any, source: Path, folder: Path, **options: Any) -> None:
    """Write the weights and config.json as transformers does, beside copies of the other files."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if not file.name.startswith("model") and file.is_file():
            shutil.copy(file, folder)
    model.save_pretrained(folder, **options)


def run(main: Callable[[Path, str, Path, Path | None], None]) -> None:
    """Make what the command line asks for: SOURCE FORM CODED DEQUANTIZED.

    Or SOURCE FORM,FORM FOLDER: several forms in one process, each in the folder of its name and
    without its dequantized weights.
    """
    source, forms, coded, *dequantized = sys.argv[1:]
    for form in forms.split(","):
        if dequantized:
            main(Path(source), form, Path(coded), Path(dequantized[0]))
        else:
            main(Path(source), form, Path(coded) / form, None)
