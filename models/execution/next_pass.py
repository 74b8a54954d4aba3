"""The pass of the next decode step, started while the tokens that it reads are on the device only.

Between two steps a device would wait for the host: for the copy of the tokens, for messages, the
scheduler and the next step's inputs. A pass that is started right after the sampling computes
meanwhile. It decides nothing: stops, cancels, grammars, penalties and log-probabilities are settled
by the scheduler and the sampling of the next step, as without it. If the next step turns out to be
another one, it computes its tokens again, and the started pass is not used.

What a started pass changes is one slot a row, behind the tokens that are computed. Why this harms
no other sequence, also if the row's sequence has ended and its block has a new owner:

    slots     a block is planned into a step, or copied, loaded or poisoned, after the pass was
              started. All of these are queued on the same stream, so their writes come later.
    reads     a row reads up to its own last token, and each of its slots is written by a pass of
              its own first. So nothing reads a slot that a pass for another sequence wrote.
    caches    the prefix cache has blocks of computed tokens alone. The slot is behind these: it is
              in no cached block before the step that computes its token writes it again.
    images    a pass reads image blocks and writes none.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from ..batch import (
    MayStart,
    OnLaunch,
    ScheduledSequence,
    StepBatch,
    TokenLogprobs,
    ignore,
    never,
)
from ..device_copies import Download, fetch, upload
from ..kv_cache.step_inputs import PreparedRows
from ..kv_cache.step_tensors import Hidden
from ..sampling.logprobs import RawLogprobs
from ..sampling.sampler import Sampled
from .graphs.decode import DecodeGraphs, StagedStep

# between two looks at whether the tokens have arrived before the next rows were prepared
_POLL_S = 1e-4


@dataclass(slots=True, frozen=True)
class StartedPass:
    """A pass over rows of one token each.

    places: of the rows' tokens among those that were sampled. token_ids: these tokens, when they
    are known. hidden: the states after them.
    """

    rows: Sequence[ScheduledSequence]
    places: Sequence[int]
    hidden: Hidden
    token_ids: Sequence[int] = ()

    def knowing(self, sampled: Sequence[int]) -> StartedPass:
        """The same pass when the tokens that it read from the device are on the host too."""
        return replace(self, token_ids=[sampled[place] for place in self.places])

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
        self, sampled: Sequence[ScheduledSequence], token_ids: Tensor, graphs: DecodeGraphs
    ) -> StartedPass | None:
        """Start the rows' pass with the tokens that are sampled; None if it is not to be.

        token_ids: on the device, int64. sampled: the sequences of these tokens. With drafts there
        are more tokens than sequences.
        """
        if self.staged is None or len(token_ids) != len(sampled):
            return None
        by_id = {one.request_id: place for place, one in enumerate(sampled)}
        rows = self.prepared.rows
        if not all(row.request_id in by_id for row in rows) or not self.may_start():
            return None
        places = [by_id[row.request_id] for row in rows]
        return StartedPass(rows, places, graphs.replay_staged(self.staged, token_ids, places))


class NextPass:
    """What is known of the next step while a step is computed.

    num_started, num_used: passes that were started before their step, and those of them that were
    their step's.
    """

    def __init__(self) -> None:
        self._rows: NextRows | None = None
        self._started: StartedPass | None = None
        self._is_prepared = threading.Event()
        self._is_late = False
        self.num_started = self.num_used = 0

    def take(self) -> tuple[PreparedRows | None, StartedPass | None]:
        """What was prepared and started for the step that begins; forgets both."""
        rows, started = self._rows, self._started
        self._rows = self._started = None
        self._is_prepared.clear()
        return None if rows is None else rows.prepared, started

    def prepare(self, rows: NextRows | None) -> None:
        """The step's next rows are known; None if there are none. Called from another thread."""
        self._rows = rows
        self._is_prepared.set()

    def collect(
        self,
        sequences: Sequence[ScheduledSequence],
        sampled: Sampled,
        raw: RawLogprobs,
        graphs: DecodeGraphs | None,
        on_launch: OnLaunch = ignore,
    ) -> tuple[list[int], dict[int, TokenLogprobs]]:
        """Start the next pass, then return each place's token and requested log-probabilities.

        on_launch: called when only the tokens are awaited; if given, `prepare` is called after it.
        graphs: None starts no pass. After a step that drew tokens again, which only the host
        orders, a pass is started when the tokens are known: an earlier one would read others.
        """
        download, started = Download([sampled.token_ids, *raw.tensors(sampled.token_ids)]), None
        on_launch()
        if not self._is_late:
            if on_launch is not ignore:
                self._wait_prepared(download)
            started = self._start(sequences, sampled.token_ids, graphs)
        token_ids, *arrays = download.wait()
        self._is_late = False
        while not sampled.is_decided(token_ids):
            self._is_late, started = True, None
            token_ids, *arrays = fetch([sampled.token_ids, *raw.tensors(sampled.token_ids)])
        known = token_ids.tolist()
        started = started or self._start(sequences, sampled.token_ids, graphs)
        self._started = None if started is None else started.knowing(known)
        return known, raw.of(arrays)

    def _wait_prepared(self, download: Download) -> None:
        """Return when the next rows are known, or the tokens have arrived before."""
        while not (self._is_prepared.is_set() or download.is_done):
            self._is_prepared.wait(_POLL_S)

    def _start(
        self, sequences: Sequence[ScheduledSequence], token_ids: Tensor, graphs: DecodeGraphs | None
    ) -> StartedPass | None:
        if self._rows is None or graphs is None:
            return None
        started = self._rows.start(sequences, token_ids, graphs)
        self.num_started += started is not None
        return started


def _changes_blocks(batch: StepBatch) -> bool:
    """Whether blocks are changed before a step's pass, so that the pass cannot be before it."""
    is_freed = batch.freed_text_blocks or batch.freed_image_blocks
    return bool(batch.copies or batch.loads or is_freed)
