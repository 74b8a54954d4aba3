"""The pass of the next step, started while the tokens that it reads are on the device only.

Between two steps a device would wait for the host: for the copy of the tokens, for messages, the
scheduler and the next step's inputs. A pass that is started right after the sampling computes
meanwhile. It decides nothing: stops, cancels, grammars, penalties and log-probabilities are settled
by the scheduler and the sampling of the next step, as without it. If the next step turns out to be
another one, it computes its tokens again, and the started pass is not used.

A pass of decodes alone is a replay of a recorded one. One with chunks of prompts, whose tokens are
on the host, is launched operation by operation, which takes the host about as long as the step
before takes the device.

What a started pass changes are the slots of its rows' tokens, behind the tokens that are computed.
Why this harms no other sequence, also if a row's sequence has ended and its blocks have new owners:

    slots     a block is planned into a step, or copied, loaded or poisoned, after the pass was
              started. All of these are queued on the same stream, so their writes come later.
    reads     a row reads up to its own last token, and each of its slots is written by a pass of
              its own first. So nothing reads a slot that a pass for another sequence wrote.
    caches    the prefix cache has blocks of computed tokens alone. The slots are behind these: they
              are in no cached block before the step that computes their tokens writes them again.
    images    a pass reads image blocks and writes none. The images that a chunk sees are encoded by
              the running step or before it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
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
from ..kv_cache.step_inputs import PreparedRows, StepInputs
from ..kv_cache.step_tensors import Hidden
from ..sampling.logprobs import RawLogprobs
from ..sampling.sampler import Sampled
from .graphs.decode import DecodeGraphs

# between two looks at whether the tokens have arrived before the next rows were prepared
_POLL_S = 1e-4


@dataclass(slots=True, frozen=True)
class StartedPass:
    """A pass over rows: first those of one sampled token each, then chunks of known tokens.

    places: of the first rows' tokens among those that were sampled. hidden: the states after all
    tokens. token_ids: of each row, when the sampled ones are known.
    """

    rows: Sequence[ScheduledSequence]
    places: Sequence[int]
    hidden: Hidden
    token_ids: Sequence[list[int]] = ()

    @property
    def has_chunks(self) -> bool:
        """Whether any of its tokens are of prompts."""
        return len(self.places) < len(self.rows)

    def knowing(self, sampled: Sequence[int]) -> StartedPass:
        """The same pass when the tokens that it read from the device are on the host too."""
        chunks = [row.token_ids for row in self.rows[len(self.places) :]]
        return replace(self, token_ids=[[sampled[place]] for place in self.places] + chunks)

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
            if place is None or row.token_ids != self.token_ids[place] or row.prompt is not None:
                return None
            found.append(place)
        if found == list(range(len(self.rows))):
            return self.hidden
        ends = np.cumsum([len(token_ids) for token_ids in self.token_ids])
        is_sampled = [row.sampling is not None for row in batch.sequences]
        lasts = ends[found][is_sampled] - 1
        return replace(self.hidden, sampled=upload(lasts, self.hidden.states.device, np.int64))


# Starts a pass with tokens on the device, int64: a negative one counts as 0. The first rows' tokens
# are those at the places; the others are known.
Launch = Callable[[Tensor, Sequence[int]], Hidden]


@dataclass(slots=True, frozen=True)
class NextRows:
    """Rows that the next step may have. launch: of their pass; None if it is not started."""

    prepared: PreparedRows
    launch: Launch | None
    may_start: MayStart

    @classmethod
    def of(
        cls,
        prepared: PreparedRows,
        graphs: DecodeGraphs | None,
        eager: Callable[[StepInputs, Tensor, Sequence[int]], Hidden],
        may_start: MayStart,
    ) -> NextRows:
        """Stage the pass of prepared rows that may be started: recorded if possible, else eager."""
        if graphs is None or may_start is never or any(row.adapter for row in prepared.rows):
            return cls(prepared, None, may_start)
        staged = graphs.stage(prepared.inputs)
        if staged is None:
            return cls(prepared, partial(eager, prepared.inputs), may_start)
        return cls(prepared, partial(graphs.replay_staged, staged), may_start)

    def start(self, sampled: Sequence[ScheduledSequence], token_ids: Tensor) -> StartedPass | None:
        """Start the rows' pass with the tokens that are sampled; None if it is not to be.

        token_ids: on the device, int64. sampled: the sequences of these tokens. With drafts there
        are more tokens than sequences.
        """
        if self.launch is None or len(token_ids) != len(sampled):
            return None
        by_id = {one.request_id: place for place, one in enumerate(sampled)}
        rows = self.prepared.rows
        places = [by_id[row.request_id] for row in rows if row.request_id in by_id]
        assert not any(row.request_id in by_id for row in rows[len(places) :]), "chunks come last"
        if not self.may_start():
            return None
        return StartedPass(rows, places, self.launch(token_ids, places))


class NextPass:
    """What is known of the next step while a step is computed.

    num_started, num_used: passes that were started before their step, and those of them that were
    their step's. num_chunks_used: of these, those with chunks of prompts.
    """

    def __init__(self) -> None:
        self._rows: NextRows | None = None
        self._started: StartedPass | None = None
        self._is_prepared = threading.Event()
        self._is_late = False
        self.num_started = self.num_used = self.num_chunks_used = 0

    def take(self) -> tuple[PreparedRows | None, StartedPass | None]:
        """What was prepared and started for the step that begins; forgets both."""
        rows, started = self._rows, self._started
        self._rows = self._started = None
        self._is_prepared.clear()
        return None if rows is None else rows.prepared, started

    def hidden_of(self, started: StartedPass | None, batch: StepBatch) -> Hidden | None:
        """What a started pass computed of a batch; None if it is not the batch's."""
        hidden = None if started is None else started.of(batch)
        if started is not None and hidden is not None:
            self.num_used += 1
            self.num_chunks_used += started.has_chunks
        return hidden

    def prepare(self, rows: NextRows | None) -> None:
        """The step's next rows are known; None if there are none. Called from another thread."""
        self._rows = rows
        self._is_prepared.set()

    def collect(
        self,
        sequences: Sequence[ScheduledSequence],
        sampled: Sampled,
        raw: RawLogprobs,
        may_start: bool,
        on_launch: OnLaunch = ignore,
    ) -> tuple[list[int], dict[int, TokenLogprobs]]:
        """Start the next pass, then return each place's token and requested log-probabilities.

        on_launch: called when only the tokens are awaited; if given, `prepare` is called after it.
        may_start: False starts no pass. After a step that drew tokens again, which only the host
        orders, a pass is started when the tokens are known: an earlier one would read others.
        """
        download, started = Download([sampled.token_ids, *raw.tensors(sampled.token_ids)]), None
        on_launch()
        if not self._is_late:
            if on_launch is not ignore:
                self._wait_prepared(download)
            started = self._start(sequences, sampled.token_ids, may_start)
        token_ids, *arrays = download.wait()
        self._is_late = False
        while not sampled.is_decided(token_ids):
            self._is_late, started = True, None
            token_ids, *arrays = fetch([sampled.token_ids, *raw.tensors(sampled.token_ids)])
        known = token_ids.tolist()
        started = started or self._start(sequences, sampled.token_ids, may_start)
        self._started = None if started is None else started.knowing(known)
        return known, raw.of(arrays)

    def _wait_prepared(self, download: Download) -> None:
        """Return when the next rows are known, or the tokens have arrived before."""
        while not (self._is_prepared.is_set() or download.is_done):
            self._is_prepared.wait(_POLL_S)

    def _start(
        self, sequences: Sequence[ScheduledSequence], token_ids: Tensor, may_start: bool
    ) -> StartedPass | None:
        if self._rows is None or not may_start:
            return None
        try:
            started = self._rows.start(sequences, token_ids)
        except torch.OutOfMemoryError:
            return None  # it lies beside what the sampling of its step still needs
        self.num_started += started is not None
        return started


def _changes_blocks(batch: StepBatch) -> bool:
    """Whether blocks are changed before a step's pass, so that the pass cannot be before it."""
    is_freed = batch.freed_text_blocks or batch.freed_image_blocks
    return bool(batch.copies or batch.loads or is_freed)
