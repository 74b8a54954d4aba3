"""What the engine expects of the code that computes its steps.

Owns the interface, and the check of a result. `models/execution/runner.py` implements it, and for
several ranks `models/distributed/parallel_runner.py`. Tests implement it by hashing instead of
computing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ...models.batch import (
    AdapterInfo,
    AdapterRef,
    MayStart,
    ModelInfo,
    OnLaunch,
    ScheduledSequence,
    StepBatch,
    StepResult,
    TokenMatcher,
    ignore,
    never,
)


class Adapters(Protocol):
    """The adapters in the runner's memory, by digest. Called from any thread."""

    def read(self, ref: AdapterRef) -> AdapterInfo:
        """Read and check an adapter, so that steps can use it.

        Raises ValueError, one line, if it cannot be used.
        """
        ...

    def forget(self, digest: str) -> None:
        """Release an adapter. No later step uses it, until it is read again."""
        ...


class Runner(Protocol):
    """Computes one step at a time; `models/batch.py` has its input and output."""

    @property
    def info(self) -> ModelInfo:
        """The loaded model."""
        ...

    @property
    def adapters(self) -> Adapters | None:
        """Its adapters; None if --max-loras is 0."""
        ...

    @property
    def num_layers_started(self) -> int:
        """How many layers all steps have started. Read from another thread."""
        ...

    def execute(self, batch: StepBatch, on_launch: OnLaunch = ignore) -> StepResult:
        """Compute one step. Called from one thread, one call at a time.

        An exception ends the requests of the step; DeviceLostError ends the engine.
        """
        ...

    def prepare(self, rows: list[ScheduledSequence], may_start: MayStart = never) -> None:
        """Lay out the rows that the next step will probably have, without their tokens.

        Called from the loop's thread, between a step's `on_launch` and the next step. The runner
        may start that step when the tokens are known, if `may_start` is true then; `execute` is
        called for it later, or for another step.
        """
        ...

    def call_between_layers(self, callback: Callable[[], None]) -> bool:
        """From now on call `callback` before each layer of a step, in the step's thread.

        It may call `execute` for another step. False if this runner cannot do that.
        """
        ...

    def compile_grammar(self, grammar: str, eos_token_ids: list[int], tenant: str) -> TokenMatcher:
        """A matcher at a grammar's start. Called from its own thread.

        The compiled grammar is cached for `tenant` alone.
        Raises ValueError, with a message for the client, if the grammar cannot be compiled.
        """
        ...


def check_result(batch: StepBatch, result: StepResult) -> None:
    """Raise RuntimeError if the result lacks what the step was to compute, or has more."""
    rows = batch.sequences
    sampled = {row.request_id for row in rows if row.sampling is not None}
    if result.token_ids.keys() != sampled:
        raise RuntimeError(
            f"the runner sampled {len(result.token_ids)} tokens, {len(sampled)} were due"
        )
    due = {row.request_id: len(row.prompt.token_ids) for row in rows if row.prompt is not None}
    computed = {name: len(entries) for name, entries in result.prompt_logprobs.items()}
    if computed != due:
        raise RuntimeError("the runner returned other prompt log-probabilities than were due")
