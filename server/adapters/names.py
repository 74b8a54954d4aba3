"""Which names adapters may have, and which folders a request may load them from."""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

from ...models.lora.files import CONFIG, WEIGHTS
from ..errors import BadRequestError, NotFoundError

# Names are written into logs, and into a metric's label that separates them by commas.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")
MAX_PATH_CHARS = 4096


def why_not(name: str) -> str | None:
    """Why an adapter cannot have this name; None if it can."""
    if NAME.fullmatch(name):
        return None
    return (
        f"the adapter's name is {name[:140]!r}; it must have 1 to 128 letters, digits or any of"
        " . _ : / @ + - and start with a letter or digit"
    )


class Given(msgspec.Struct):
    """One value of --lora, as vLLM's JSON form has it. base_model_name has no effect."""

    name: str
    path: str
    base_model_name: str | None = None


def parse(value: str) -> Given:
    """A value of --lora. Raises ValueError, one line."""
    if value.lstrip().startswith("{"):
        try:
            given = msgspec.json.decode(value, type=Given)
        except msgspec.MsgspecError as error:
            raise ValueError(f"--lora {value!r}: {error}") from error
    else:
        name, separator, path = value.partition("=")
        if not separator or not path:
            raise ValueError(
                f"--lora {value!r}: give NAME=FOLDER or NAME=HUB_ID, such as"
                " radiology=./adapters/radiology"
            )
        given = Given(name, path)
    if (reason := why_not(given.name)) is not None:
        raise ValueError(f"--lora: {reason}")
    return given


class OutsideError(BadRequestError):
    """A path that a request may not load."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"lora_path {reason}: name a folder below the server's --lora-root", param="lora_path"
        )


def folder_below(path: str, root: Path) -> Path:
    """The folder that a request names, absolute or from `root`, with all symlinks resolved.

    The folder and the two files of the adapter lie below `root`, after symlinks too. A path outside
    is refused by its text alone, so that the answer does not show what exists there.
    Raises OutsideError, or NotFoundError if there is nothing.
    """
    if "\0" in path or len(path) > MAX_PATH_CHARS:
        raise OutsideError("is not a path")
    named = Path(os.path.normpath(root / path))
    real_root = root.resolve()
    if not (named.is_relative_to(root) or named.is_relative_to(real_root)):
        raise OutsideError("is outside the folder for adapters")
    try:
        folder = named.resolve(strict=True)
        files = [(folder / name).resolve() for name in (CONFIG, WEIGHTS)]
    except (OSError, RuntimeError):  # RuntimeError: symlinks in a circle
        raise _missing(path) from None
    if not all(one.is_relative_to(real_root) for one in (folder, *files)):
        raise OutsideError("leads out of the folder for adapters by a symlink")
    if not folder.is_dir():
        raise _missing(path)
    return folder


def _missing(path: str) -> NotFoundError:
    return NotFoundError(f"no adapter at lora_path {path[:256]!r}", param="lora_path")
