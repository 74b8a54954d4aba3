"""Counts restarts: the supervisor writes the counts to a file, the workers report them.

The file is in the folder of the workers' metrics.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal, get_args

import msgspec

logger = logging.getLogger(__name__)

FILE_NAME = "restarts.json"
RestartReason = Literal["ended", "hung"]


def _none() -> dict[RestartReason, int]:
    return dict.fromkeys(get_args(RestartReason), 0)


class RestartCounts(msgspec.Struct):
    """Restarts by their reason, since the server started. of_replicas: those of each engine."""

    engine: dict[RestartReason, int] = msgspec.field(default_factory=_none)
    worker: dict[RestartReason, int] = msgspec.field(default_factory=_none)
    of_replicas: dict[int, int] = msgspec.field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> RestartCounts:
        """The counts so far; zero if there is no file yet."""
        try:
            return msgspec.json.decode((folder / FILE_NAME).read_bytes(), type=cls)
        except FileNotFoundError:
            return cls()


class RestartCounter:
    """Counts restarts and writes the file. A full disk only makes /metrics outdated."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE_NAME
        self._counts = RestartCounts()

    def count_engine(self, reason: RestartReason, replica: int) -> None:
        """Count one restart of an engine. replica: its number."""
        of_replicas = self._counts.of_replicas
        of_replicas[replica] = of_replicas.get(replica, 0) + 1
        self._count(self._counts.engine, reason)

    def count_worker(self, reason: RestartReason) -> None:
        """Count one restart of an HTTP worker."""
        self._count(self._counts.worker, reason)

    def _count(self, counts: dict[RestartReason, int], reason: RestartReason) -> None:
        counts[reason] += 1
        fresh = self._file.with_suffix(".new")
        try:
            fresh.write_bytes(msgspec.json.encode(self._counts))
            fresh.replace(self._file)
        except OSError as error:
            logger.warning("/metrics misses a restart: %s", error.strerror)
