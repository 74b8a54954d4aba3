"""The names of the served adapters, the same in all workers of a server.

Owns the file with them, in the folder that all workers share: replaced as a whole under a lock, and
read again when it has changed. While there is no file, the adapters are those of the start. Without
a folder they are in memory. Knows nothing of how adapters are read.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec

from ..errors import BadRequestError
from .settings import Origin, ServedAdapter

FILE_NAME, LOCK_NAME = "adapters.json", "adapters.lock"
MAX_ADAPTERS = 1_000

Adapters = dict[str, ServedAdapter]


class NameTakenError(BadRequestError):
    """The name is that of the model or of another adapter."""


class AdapterRegistry:
    """model_names: those of the base model. folder: where workers share the names."""

    def __init__(
        self,
        at_start: Iterable[ServedAdapter] = (),
        model_names: Iterable[str] = (),
        folder: Path | None = None,
    ) -> None:
        self._at_start = {one.name: one for one in at_start}
        self._model_names = frozenset(model_names)
        self._folder = folder
        self._known: Adapters = dict(self._at_start)
        self._version: tuple[int, int] | None = None

    def find(self, name: str) -> ServedAdapter | None:
        """The adapter that is served under this name now."""
        return self._now().get(name)

    def all(self) -> list[ServedAdapter]:
        """All served adapters, in the order in which they were added."""
        return list(self._now().values())

    def add(self, adapter: ServedAdapter, may_replace: Callable[[Origin], bool]) -> None:
        """Serve an adapter under its name.

        may_replace: whether it may take the name of an adapter of this origin.
        Raises NameTakenError, or BadRequestError if there are too many.
        """

        def change(known: Adapters) -> None:
            self.check_free(adapter.name, may_replace, known)
            known[adapter.name] = adapter

        self._change(change)

    def check_free(
        self, name: str, may_replace: Callable[[Origin], bool], known: Adapters | None = None
    ) -> None:
        """Raises as `add` does. known: None: those that are served now."""
        known = self._now() if known is None else known
        if name in self._model_names:
            raise NameTakenError(
                f"{name!r} is the model's own name: choose another", param="lora_name"
            )
        other = known.get(name)
        if other is not None and not may_replace(other.origin):
            raise NameTakenError(
                f"the lora adapter {name!r} has already been loaded. To load it again in place, set"
                " 'load_inplace' to true",
                param="lora_name",
            )
        if other is None and len(known) >= MAX_ADAPTERS:
            raise BadRequestError(
                f"{MAX_ADAPTERS:,} adapters are served, which is the limit: unload one first",
                param="lora_name",
            )

    def remove(self, name: str) -> ServedAdapter | None:
        """Serve this name no longer; returns its adapter, or None if there was none."""
        removed: list[ServedAdapter] = []

        def change(known: Adapters) -> None:
            if name in known:
                removed.append(known.pop(name))

        self._change(change)
        return removed[0] if removed else None

    def _now(self) -> Adapters:
        """The served adapters; the file is read only if it has changed."""
        if self._folder is None:
            return self._known
        try:
            found = os.stat(self._folder / FILE_NAME)
        except FileNotFoundError:
            return self._known
        version = (found.st_ino, found.st_mtime_ns)
        if version != self._version:
            self._known = self._read()
            self._version = version
        return self._known

    def _read(self) -> Adapters:
        assert self._folder is not None, "there is no file"
        content = (self._folder / FILE_NAME).read_bytes()
        return {one.name: one for one in msgspec.json.decode(content, type=list[ServedAdapter])}

    def _change(self, change: Callable[[Adapters], None]) -> None:
        """Change the adapters, and the file. What `change` raises leaves both as they are."""
        with self._locked():
            known = dict(self._now())
            change(known)
            if self._folder is None:
                self._known = known
                return
            fresh = self._folder / f"{FILE_NAME}.new"
            fresh.write_bytes(msgspec.json.encode(list(known.values())))
            fresh.replace(self._folder / FILE_NAME)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """No other worker changes the file meanwhile. The kernel frees the lock of a dead one."""
        if self._folder is None:
            yield
            return
        descriptor = os.open(self._folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
