"""How often children were started again: counted by the supervisor, read by its workers.

Owns the file between the two, which lies beside the workers' figures. Knows nothing of why or
when a child is started again, or of how the counts are told.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal, get_args

import msgspec

logger = logging.getLogger(__name__)

FILE_NAME = "restarts.json"
Restarted = Literal["engine", "worker"]
RestartReason = Literal["ended", "hung"]


def _none() -> dict[RestartReason, int]:
    return dict.fromkeys(get_args(RestartReason), 0)


class RestartCounts(msgspec.Struct):
    """Restarts by their reason, since the server started."""

    engine: dict[RestartReason, int] = msgspec.field(default_factory=_none)
    worker: dict[RestartReason, int] = msgspec.field(default_factory=_none)

    @classmethod
    def read(cls, folder: Path) -> RestartCounts:
        """What was counted; nothing was where there is no file."""
        try:
            return msgspec.json.decode((folder / FILE_NAME).read_bytes(), type=cls)
        except FileNotFoundError:
            return cls()


class RestartCounter:
    """Counts, and writes what it counted. A disk that is full costs the figures alone."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE_NAME
        self._counts = RestartCounts()

    def count(self, process: Restarted, reason: RestartReason) -> None:
        """A process of this kind is started again."""
        counts = self._counts.engine if process == "engine" else self._counts.worker
        counts[reason] += 1
        fresh = self._file.with_suffix(".new")
        try:
            fresh.write_bytes(msgspec.json.encode(self._counts))
            fresh.replace(self._file)
        except OSError as error:
            logger.warning("a restart is not told at /metrics: %s", error.strerror)
