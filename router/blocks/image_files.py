"""Encoded images as files in memory, outside the engine's process: what a restarted engine finds.

Owns the files of one folder: names, format, checksum, and the bound of all bytes, whichever engine
wrote them. Knows nothing of blocks, of threads or of what the bytes mean.

    name    digest of the model's signature and of the image's key, which has the tenant
    file    magic | the name's digest | CRC-32 of the data | its length | data

A file appears whole, by a rename. One writer at a time, over all engines, makes room: the file that
was used longest ago goes first. A file that is gone, or was cut short, is never mapped.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import msgspec

from .image_pool import ImageKey

HEAD = struct.Struct("<8s32sIQ")
MAGIC = b"VLMIMG01"
LOCK, UNFINISHED = "lock", ".new"
# a listing of more would take longer than a step
MAX_FILES = 4_096


class DamagedImageError(Exception):
    """A file is not what was written. The message names the file and what is wrong."""


class ImageFiles:
    """The encoded images of one folder, of at most limit_bytes; signature: of the model."""

    def __init__(self, folder: Path, limit_bytes: int, signature: bytes) -> None:
        self._folder, self._limit_bytes, self._signature = folder, limit_bytes, signature
        self.num_evictions = 0

    def name_of(self, key: ImageKey) -> str:
        """The file of an image, for this model."""
        parts = msgspec.msgpack.encode([self._signature, *key])
        return blake2b(parts, digest_size=32).hexdigest()

    def has(self, name: str) -> bool:
        """True if there is a file of that name; it may be damaged."""
        return os.path.exists(self._folder / name)

    def num_bytes(self) -> int:
        """The bytes of all files."""
        return sum(size for _, size, _ in self._list())

    def read(self, name: str, num_bytes: int) -> memoryview | None:
        """The data of an image of so many bytes, mapped; None if it is gone.

        Raises DamagedImageError, and removes the file, if it is not what was written.
        """
        path = self._folder / name
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if size else b""
            os.utime(path)
        except FileNotFoundError:
            return None
        data = memoryview(whole)[HEAD.size :]
        if (wrong := _what_is_wrong(whole, name, num_bytes)) is not None:
            path.unlink(missing_ok=True)
            raise DamagedImageError(f"{name[:16]} {wrong}")
        return data

    def write(self, name: str, data: memoryview) -> bool:
        """Store an image; False if it is larger than the bound. Raises OSError."""
        num_bytes = HEAD.size + len(data)
        if num_bytes > self._limit_bytes:
            return False
        head = HEAD.pack(MAGIC, bytes.fromhex(name), zlib.crc32(data), len(data))
        with self._locked():
            self._make_room(num_bytes)
            path = self._folder / f"{name}{UNFINISHED}"
            try:
                with open(path, "wb", opener=_private) as file:
                    file.write(head)
                    file.write(data)
                os.rename(path, self._folder / name)
            except OSError:
                path.unlink(missing_ok=True)
                raise
        return True

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self._folder / LOCK, "ab", opener=_private) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, num_bytes: int) -> None:
        """Remove what was used longest ago until so many bytes more fit; under the lock."""
        files = sorted(self._list())
        total = num_bytes + sum(size for _, size, _ in files)
        num_left = len(files) + 1
        for _, size, name in files:
            is_unfinished = name.endswith(UNFINISHED)  # its writer is dead
            if is_unfinished or total > self._limit_bytes or num_left > MAX_FILES:
                (self._folder / name).unlink(missing_ok=True)
                total, num_left = total - size, num_left - 1
                self.num_evictions += not is_unfinished

    def _list(self) -> list[tuple[int, int, str]]:
        """When each file was used last, its bytes and its name."""
        found = []
        for entry in os.scandir(self._folder):
            with contextlib.suppress(FileNotFoundError):
                if entry.name != LOCK:
                    stat = entry.stat()
                    found.append((stat.st_mtime_ns, stat.st_size, entry.name))
        return found


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _what_is_wrong(whole: mmap.mmap | bytes, name: str, num_bytes: int) -> str | None:
    """What a file has that was not written, in a few words; None if it is right."""
    if len(whole) != HEAD.size + num_bytes:
        return f"has {len(whole):,} bytes, not {HEAD.size + num_bytes:,}"
    magic, digest, checksum, length = HEAD.unpack_from(whole)
    if (magic, digest, length) != (MAGIC, bytes.fromhex(name), num_bytes):
        return "has the head of another file"
    if zlib.crc32(memoryview(whole)[HEAD.size :]) != checksum:
        return "has a wrong checksum"
    return None
