"""What the engine expects of whatever computes its steps.

Owns the interface alone: `models/execution/runner.py` and, over several ranks,
`models/distributed/parallel_runner.py` have it, and so have the tests' runners, which hash
instead of computing.
"""

from __future__ import annotations

from typing import Protocol

from ...models.batch import (
    ModelInfo,
    OnLaunch,
    ScheduledSequence,
    StepBatch,
    StepResult,
    TokenMatcher,
    ignore,
)


class Runner(Protocol):
    """Computes one step at a time; `models/batch.py` has what goes in and comes out."""

    @property
    def info(self) -> ModelInfo:
        """What was loaded."""
        ...

    @property
    def num_layers_started(self) -> int:
        """Grows while a step computes. Read from another thread."""
        ...

    def execute(self, batch: StepBatch, on_launch: OnLaunch = ignore) -> StepResult:
        """Compute one step. Called from one thread, one call at a time.

        What it raises ends the requests of the step; DeviceLostError the engine.
        """
        ...

    def prepare(self, rows: list[ScheduledSequence]) -> None:
        """Lay out the rows that the next step is likely to hold, all but their tokens.

        Called from the loop's thread, between a step's `on_launch` and the next step.
        """
        ...

    def compile_grammar(self, grammar: str, eos_token_ids: list[int], tenant: str) -> TokenMatcher:
        """A matcher at a grammar's start. Called from a thread of its own.

        What is kept of it serves `tenant` alone.
        Raises ValueError, fit for a client, if the grammar cannot be compiled.
        """
        ...
