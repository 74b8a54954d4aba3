"""A gate before a fake runner's steps, so that a test decides when a step may go on."""

from __future__ import annotations

import threading

from support.polling import FAR_S

from vlmserve.models.batch import StepBatch


class StepGate:
    """Lets the first steps through and holds each later one until it is opened.

    Given as `before_step` of a FakeRunner, which calls it in the step's thread. Open it before the
    engine is closed: a step that is held keeps its thread. num_sequences: those of the held step.
    """

    def __init__(self, num_free_steps: int = 0) -> None:
        self._num_free_steps = num_free_steps
        self._open = threading.Event()
        self.num_steps = 0
        self.num_sequences = 0

    def __call__(self, batch: StepBatch) -> None:
        self.num_steps += 1
        if self.num_steps > self._num_free_steps and not self._open.is_set():
            self.num_sequences = len(batch.sequences)
            assert self._open.wait(FAR_S), "the gate stayed shut"

    @property
    def is_holding(self) -> bool:
        """Whether a step has come that the gate held; stays true after it was opened."""
        return self.num_sequences > 0

    def open(self) -> None:
        self._open.set()

    def shut(self) -> None:
        """Hold the next step."""
        self._num_free_steps, self.num_sequences = 0, 0
        self._open.clear()
