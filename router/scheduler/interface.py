"""What goes into the scheduler and what comes out of it, as plain data.

Owns the types alone; steps are in `models/batch.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from ...models.batch import TokenLogprobs
from ..blocks.contract import PoolSnapshot
from ..messages import FinishReason
from .request_queue import RequestQueue
from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """How much one step computes at most, how long a sequence may get, and what is cached."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_batched_images: int
    max_model_len: int
    prefix_cache: bool = True
    image_cache: bool = True
    poison_freed_blocks: bool = False
    max_loras: int = 0
    num_speculative_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step, or an abort, changed for one sequence."""

    sequence: Sequence
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(slots=True)
class DraftCounts:
    """Rows that had drafts, their drafts, and how many of these became tokens of answers."""

    num_rows: int = 0
    num_tokens: int = 0
    num_accepted: int = 0

    def add(self, num_tokens: int, num_accepted: int) -> None:
        """Count a row."""
        self.num_rows += 1
        self.num_tokens += num_tokens
        self.num_accepted += num_accepted


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerCounts:
    """What the scheduler counts anyway: however many sequences there are, it takes no longer."""

    num_running: int
    text: PoolSnapshot
    images: PoolSnapshot
    num_preemptions: int
    num_images_encoded: int
    prefix_tokens_queried: int
    prefix_tokens_hit: int
    drafts: DraftCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSnapshot(SchedulerCounts):
    """The scheduler's state at one moment. waiting, running: sequence ids, by rank.

    waiting_tokens, waiting_bytes: tokens and image bytes of the waiting sequences.
    """

    waiting: tuple[str, ...]
    running: tuple[str, ...]
    waiting_tokens: int
    waiting_bytes: int

    @classmethod
    def of(
        cls, counts: SchedulerCounts, queue: RequestQueue, running: list[Sequence]
    ) -> SchedulerSnapshot:
        """The counts with what waits and runs."""
        waiting = sorted(queue, key=lambda sequence: sequence.rank)
        return cls(
            **{one.name: getattr(counts, one.name) for one in fields(counts)},
            waiting=tuple(sequence.sequence_id for sequence in waiting),
            running=tuple(sequence.sequence_id for sequence in running),
            waiting_tokens=queue.num_tokens,
            waiting_bytes=queue.num_bytes,
        )
