"""The two files of an adapter: where they are, and the digest that identifies them.

Imports no torch, so that the server can name an adapter before an engine reads it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..errors import AdapterError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
_PICKLE = "adapter_model.bin"
_CHUNK_BYTES = 1 << 20


def digest_of(folder: str | Path) -> str:
    """The SHA-256 of both files' sizes and bytes, in hexadecimal.

    Raises AdapterError, one line, if the folder is not an adapter in safetensors.
    """
    digest = hashlib.sha256()
    for file in files_of(Path(folder)):
        try:
            with open(file, "rb") as stream:
                # the size first, so that no byte can move from one file to the other
                digest.update(_size(file.stat().st_size))
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
        except OSError as error:
            raise _unreadable(file, error) from None
    return digest.hexdigest()


def read_files(folder: str | Path, digest: str, max_bytes: int) -> tuple[bytes, bytes]:
    """The bytes of the configuration and of the weights, if they have that digest.

    max_bytes: of the weights. Raises AdapterError, one line: also if the files changed since the
    digest was computed.
    """
    parts, found = [], hashlib.sha256()
    for file in files_of(Path(folder)):
        try:
            if (size := file.stat().st_size) > max_bytes:
                raise AdapterError(
                    f"{file.name} has {size:,} bytes, more than an adapter of --max-lora-rank can "
                    f"have on this model ({max_bytes:,})"
                )
            part = file.read_bytes()
        except OSError as error:
            raise _unreadable(file, error) from None
        found.update(_size(len(part)))
        found.update(part)
        parts.append(part)
    if found.hexdigest() != digest:
        raise AdapterError("the files changed after the adapter was added: add it again")
    return parts[0], parts[1]


def files_of(folder: Path) -> tuple[Path, Path]:
    """The configuration and the weights. Raises AdapterError if one is missing."""
    config, weights = folder / CONFIG, folder / WEIGHTS
    if not config.is_file():
        raise AdapterError(f"{CONFIG} is missing: not an adapter")
    if config.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterError(f"{CONFIG} has over {MAX_CONFIG_BYTES:,} bytes")
    if not weights.is_file():
        if (folder / _PICKLE).is_file():
            raise AdapterError(
                f"{_PICKLE} is a pickle file, which can run code, so it is not loaded; save the "
                f"adapter as {WEIGHTS}"
            )
        raise AdapterError(f"{WEIGHTS} is missing")
    return config, weights


def _size(num_bytes: int) -> bytes:
    return num_bytes.to_bytes(8, "big")


def _unreadable(file: Path, error: OSError) -> AdapterError:
    return AdapterError(f"{file.name} cannot be read: {error.strerror}")
