"""Reads a model's folder: its licence, its files, a digest of its configuration.

Owns their places in the folder. Reads no weights. Knows nothing of HTTP.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import orjson

from ..cli.model_source import HUB_PATTERNS

HUB_URL = "https://huggingface.co"


@dataclass(frozen=True, slots=True)
class License:
    """The text of a folder's own licence file, and the file's name."""

    name: str
    content: str

    @property
    def sha1(self) -> str:
        return hashlib.sha1(self.content.encode(), usedforsecurity=False).hexdigest()


class ModelFolderCard:
    """hub_id: the repository on the hub that the folder came from; None for a local folder."""

    def __init__(self, folder: Path, hub_id: str | None) -> None:
        self._folder = folder
        self._hub_id = hub_id

    @property
    def url(self) -> str:
        """The model's page; empty without one."""
        return f"{HUB_URL}/{self._hub_id}" if self._hub_id else ""

    @property
    def license_url(self) -> str:
        """The licence's page on the hub; empty without one."""
        found = self.license()
        return f"{self.url}/blob/main/{found.name}" if self.url and found else ""

    def license(self) -> License | None:
        """The folder's own licence file, if any. There is no default."""
        for file in sorted(self._folder.glob("LICENSE*")):
            if file.is_file():
                return License(file.name, file.read_bytes().decode("utf-8", "replace"))
        return None

    def config_digest(self) -> str:
        """SHA-256 of config.json: equal for equal models."""
        return hashlib.sha256((self._folder / "config.json").read_bytes()).hexdigest()

    def manifest(self) -> str:
        """The files that the server may read, with their sizes in bytes, as JSON."""
        names = {
            file.name: file.stat().st_size
            for pattern in HUB_PATTERNS
            for file in self._folder.glob(pattern)
            if file.is_file()
        }
        files = [{"name": name, "size_bytes": names[name]} for name in sorted(names)]
        return orjson.dumps({"files": files}, option=orjson.OPT_INDENT_2).decode()
