"""Reads the headers of a checkpoint's safetensors files: names, shapes, types and sizes.

Checks that each file is complete, and translates the names of older checkpoints. Imports no torch,
so that the server can check a checkpoint before it starts an engine.

    8 bytes  length of the header, little endian
    header   JSON: name -> {"dtype", "shape", "data_offsets": [begin, end]}, offsets from its end
    data     ends at the last offset
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoint import INDEX, SINGLE, read_json
from ...errors import ModelError

logger = logging.getLogger(__name__)

# the format's own limit
MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
    "F8_E8M0": 8, "F4": 4,
}  # fmt: skip
# where auto-round adds weights that it takes for missing, because it saves them under old names
EXTRA = "model_extra_tensors.safetensors"
# what PEFT leaves in front of the names of merged weights
PEFT_PREFIX = "base_model.model."
# names in checkpoints published before transformers 4.52 -> names now
_RENAMED = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "vision_model.": "model.vision_model.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


@dataclass(slots=True, frozen=True)
class StoredTensor:
    """One tensor of a file. name: its name in the module; num_bytes: in the file.

    dtype: as the format names it, such as "BF16", "" if there is no file. start: its first byte in
    the file.
    """

    name: str
    file: str
    shape: tuple[int, ...]
    num_bytes: int
    dtype: str = ""
    start: int = 0

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by its name in the module.

    Reads headers only. A whole file is loaded even if there is also an index, as transformers
    does: the index may be of an earlier save. Raises ModelError, one line, for a damaged file,
    a tensor that is in the index but not in its shard, and a tensor that is there twice. Copies in
    auto-round's file of extra tensors are ignored.
    """
    if (folder / SINGLE).is_file():
        if (folder / INDEX).is_file():
            logger.info("%s: %s is loaded, %s is ignored", folder, SINGLE, INDEX)
        return _by_name(folder, [SINGLE])
    shards: dict[str, str] = read_json(folder / INDEX)["weight_map"]
    found = _by_name(folder, sorted(set(shards.values())))
    for source, file in shards.items():
        tensor = found.get(module_name(source))
        if tensor is None or file not in (tensor.file, EXTRA):
            raise ModelError(
                f"{folder}: {INDEX} lists {source} in {file}, which does not have it; "
                "download both again"
            )
    return found


def _by_name(folder: Path, files: Sequence[str]) -> dict[str, StoredTensor]:
    """The tensors of files. A name may be there twice, as an older and as a newer one."""
    found: dict[str, StoredTensor] = {}
    for tensor in (tensor for file in files for tensor in _read_header(folder / file)):
        first = found.setdefault(tensor.name, tensor)
        if first is not tensor and tensor.file != EXTRA:
            where = " and in ".join(dict.fromkeys((first.file, tensor.file)))
            raise ModelError(
                f"{folder}: {tensor.name} is twice in {where}, under an old and a new name: remove "
                "one of them"
            )
    return found


def module_name(source: str) -> str:
    """The name in the module of a tensor named `source` in a file."""
    source = source.removeprefix(PEFT_PREFIX)
    for old, new in _RENAMED.items():
        if source.startswith(old):
            return new + source.removeprefix(old)
    return source


def _read_header(file: Path) -> list[StoredTensor]:
    size = file.stat().st_size
    with open(file, "rb") as stream:
        header_bytes = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or header_bytes > MAX_HEADER_BYTES:
            raise _damaged(file, "it is not a safetensors file")
        if size < _LENGTH_BYTES + header_bytes:
            raise _damaged(file, f"it is cut short, inside its header ({size:,} bytes)")
        raw = stream.read(header_bytes)
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        data = _LENGTH_BYTES + header_bytes
        tensors = [_tensor(file, name, entry, data) for name, entry in entries.items()]
        ends = [entry["data_offsets"][1] for entry in entries.values()]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise _damaged(file, "its header is unreadable") from None
    expected = data + max(ends, default=0)
    if size != expected:
        what = "it is cut short" if size < expected else "it is too long"
        raise _damaged(file, f"{what} ({size:,} bytes of {expected:,})")
    return tensors


def _tensor(file: Path, name: str, entry: dict[str, Any], data: int) -> StoredTensor:
    """data: where the file's data starts. Raises ValueError if shape, type and offsets disagree."""
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(isinstance(size, int) and size >= 0 for size in (*shape, begin, end)):
        raise ValueError("a size is not a number")
    if (end - begin) * 8 != math.prod(shape) * _BITS[entry["dtype"]]:
        raise ValueError("shape and offsets disagree")
    dtype = entry["dtype"]
    return StoredTensor(module_name(name), file.name, shape, end - begin, dtype, data + begin)


def _damaged(file: Path, why: str) -> ModelError:
    return ModelError(f"{file.parent}: {file.name} is damaged: {why}; download it again")
