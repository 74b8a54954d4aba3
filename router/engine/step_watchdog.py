"""The age of the running step, and how long it has made no progress.

Progress means that a layer of the model started. Owns the clock of one step. Knows nothing of what
happens to a stuck step.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ...models.batch import StepBatch


class StepWatchdog:
    """Measures the step between `begin` and `end`. clock: seconds, monotonic.

    num_layers_started: returns the runner's count; called whenever `stall_s` is read.
    """

    def __init__(
        self, num_layers_started: Callable[[], int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._num_layers_started = num_layers_started
        self._clock = clock
        self._started_at: float | None = None
        self._kind = (False, False)
        self._known_kinds: set[tuple[bool, bool]] = set()
        self._progress_at = 0.0
        self._num_seen = 0

    def begin(self, batch: StepBatch) -> None:
        """Start measuring a step."""
        self._started_at = self._progress_at = self._clock()
        has_chunks = any(len(row.token_ids) > 1 for row in batch.sequences)
        self._kind = bool(batch.images), has_chunks

    def end(self, *, is_computed: bool) -> None:
        """Stop measuring. is_computed: the step raised no exception."""
        self._started_at = None
        if is_computed:
            self._known_kinds.add(self._kind)

    @property
    def age_s(self) -> float:
        """How long the running step has been running; 0 when idle."""
        return 0.0 if self._started_at is None else self._clock() - self._started_at

    @property
    def stall_s(self) -> float:
        """Seconds since the running step's last progress seen by this property; 0 when idle."""
        if self._started_at is None:
            return 0.0
        now, num_started = self._clock(), self._num_layers_started()
        if num_started != self._num_seen:
            self._num_seen, self._progress_at = num_started, now
        return now - self._progress_at

    @property
    def is_first_of_kind(self) -> bool:
        """True if no step of the running step's kind was computed yet: it may compile kernels.

        The kind is whether images are encoded, and whether a chunk of a prompt is computed.
        """
        return self._started_at is not None and self._kind not in self._known_kinds
