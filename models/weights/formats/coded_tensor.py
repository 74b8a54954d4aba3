"""A weight that is several tensors in its file: codes, scales, zero points.

Owns that grouping, without torch. Knows no format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...decoder.coded.layout import Layout
from ...errors import ModelError
from .safetensors_headers import StoredTensor

# makes a decoder.coded.CodedWeight of a weight's tensors by their suffixes
Build = Callable[["CodedTensor", Mapping[str, Any]], Any]


@dataclass(slots=True, frozen=True, kw_only=True)
class CodedTensor(StoredTensor):
    """A coded weight under the name and shape of its plain form.

    parts: its tensors by suffix, such as "weight_scale". build: makes the coded weight of them.
    facts: what `build` needs besides.
    """

    layout: Layout
    parts: Mapping[str, StoredTensor]
    build: Build
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kept_bytes(self) -> int:
        """Bytes in memory while the weight stays coded."""
        return self.layout.kept_bytes(self.shape)


@dataclass(slots=True, frozen=True)
class Module:
    """A linear layer's tensors in the files of a folder, by suffix."""

    folder: Path
    name: str
    parts: Mapping[str, StoredTensor]

    def coded(
        self,
        shape: tuple[int, int],
        layout: Layout,
        build: Build,
        suffixes: list[str],
        **facts: Any,
    ) -> CodedTensor:
        """The layer's weight. Raises ModelError if it cannot be of that layout."""
        if (reason := layout.why_whole(shape)) is not None:
            raise self.error(reason)
        parts = {suffix: self.parts[suffix] for suffix in suffixes if suffix in self.parts}
        num_bytes = sum(part.num_bytes for part in parts.values())
        return CodedTensor(
            name=f"{self.name}.weight",
            file=next(iter(parts.values())).file,
            shape=shape,
            num_bytes=num_bytes,
            layout=layout,
            parts=parts,
            build=build,
            facts=facts,
        )

    def content(self, suffix: str) -> bytes:
        """The bytes of a small tensor."""
        part = self.parts[suffix]
        with open(self.folder / part.file, "rb") as stream:
            stream.seek(part.start)
            return stream.read(part.num_bytes)

    def content_json(self, suffix: str) -> dict[str, Any]:
        """The JSON object in a small tensor."""
        try:
            found = json.loads(self.content(suffix))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise self.error(f"{suffix} is not a JSON object")
        return found

    def error(self, reason: str) -> ModelError:
        """The error for a layer whose tensors do not fit together."""
        return ModelError(f"{self.folder}: {self.name} cannot be read as quantized: {reason}")
