"""The pass of the next decode step, started as soon as the tokens that it reads are known.

Between two steps a device would wait for the host: for messages, the scheduler and the next step's
inputs. A pass that is started before the last step's tokens are reported computes meanwhile. It
decides nothing: if the next step turns out to be another one, it computes its tokens again. That
writes the same slots again, and no other sequence reads a slot that was not written for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..batch import MayStart, ScheduledSequence, StepBatch, never
from ..device_copies import upload
from ..kv_cache.step_inputs import PreparedRows
from ..kv_cache.step_tensors import Hidden
from .graphs.decode import DecodeGraphs, StagedStep


@dataclass(slots=True, frozen=True)
class StartedPass:
    """A pass over rows of one token each. token_ids: these; hidden: the states after them."""

    rows: Sequence[ScheduledSequence]
    token_ids: Sequence[int]
    hidden: Hidden

    def of(self, batch: StepBatch) -> Hidden | None:
        """The hidden states of a batch whose rows are all of this pass; None for any other batch.

        Rows may be missing: those of sequences that ended with the last step.
        """
        if batch.images or batch.adapters or _changes_blocks(batch):
            return None
        places = {id(row): place for place, row in enumerate(self.rows)}
        found: list[int] = []
        for row in batch.sequences:
            place = places.get(id(row))
            if place is None or row.token_ids != [self.token_ids[place]] or row.prompt is not None:
                return None
            found.append(place)
        if len(found) == len(self.rows):
            return self.hidden
        sampled = upload(found, self.hidden.states.device, np.int64)
        return replace(self.hidden, sampled=sampled)


@dataclass(slots=True, frozen=True)
class NextRows:
    """Rows that the next step may have. staged: their recorded pass; None if it is not started."""

    prepared: PreparedRows
    staged: StagedStep | None
    may_start: MayStart

    @classmethod
    def of(
        cls, prepared: PreparedRows, graphs: DecodeGraphs | None, may_start: MayStart
    ) -> NextRows:
        """Stage the pass of prepared rows that may be started."""
        if graphs is None or may_start is never or any(row.adapter for row in prepared.rows):
            return cls(prepared, None, may_start)
        return cls(prepared, graphs.stage(prepared.inputs), may_start)

    def start(
        self,
        sampled: Sequence[ScheduledSequence],
        token_ids: Sequence[int],
        graphs: DecodeGraphs,
    ) -> StartedPass | None:
        """Start the rows' pass with the tokens that were sampled; None if it is not to be.

        sampled: the sequences of these tokens. With drafts there are more tokens than sequences.
        """
        if self.staged is None or len(token_ids) != len(sampled):
            return None
        by_id = {one.request_id: token for one, token in zip(sampled, token_ids, strict=True)}
        rows = self.prepared.rows
        if not all(row.request_id in by_id for row in rows) or not self.may_start():
            return None
        newest = [by_id[row.request_id] for row in rows]
        return StartedPass(rows, newest, graphs.replay_staged(self.staged, newest))


def _changes_blocks(batch: StepBatch) -> bool:
    """Whether blocks are changed before a step's pass, so that the pass cannot be before it."""
    return bool(batch.copies or batch.freed_text_blocks or batch.freed_image_blocks)
