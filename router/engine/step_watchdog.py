"""How the running step gets on: its age, and for how long it has shown no progress.

Progress is a layer of the model begun. Owns the clock of one step. Knows nothing of
what is done with a step that stands still.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ...models.batch import StepBatch


class StepWatchdog:
    """Told when steps begin and end; asked in between. clock: seconds, monotonic.

    num_layers_started: what the runner counts, read at each question.
    """

    def __init__(
        self, num_layers_started: Callable[[], int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._num_layers_begun = num_layers_started
        self._clock = clock
        self._began: float | None = None
        self._kind = (False, False)
        self._known_kinds: set[tuple[bool, bool]] = set()
        self._moved = 0.0
        self._num_seen = 0

    def begin(self, batch: StepBatch) -> None:
        """A step begins."""
        self._began = self._moved = self._clock()
        has_chunks = any(len(one.token_ids) > 1 for one in batch.sequences)
        self._kind = bool(batch.images), has_chunks

    def end(self, *, is_computed: bool) -> None:
        """The step is over; is_computed: not by an exception."""
        self._began = None
        if is_computed:
            self._known_kinds.add(self._kind)

    @property
    def age_s(self) -> float:
        """How long the running step has been running; 0 when idle."""
        return 0.0 if self._began is None else self._clock() - self._began

    @property
    def stall_s(self) -> float:
        """How long ago the running step last began a layer, as far as was asked; 0 when idle."""
        if self._began is None:
            return 0.0
        now, num_begun = self._clock(), self._num_layers_begun()
        if num_begun != self._num_seen:
            self._num_seen, self._moved = num_begun, now
        return now - self._moved

    @property
    def is_first_of_kind(self) -> bool:
        """No step like the running one was computed before: it may still compile its kernels.

        Kinds differ in whether images are encoded and whether a prompt is computed.
        """
        return self._began is not None and self._kind not in self._known_kinds
