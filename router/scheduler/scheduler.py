"""Decides which tokens run next. Knows nothing of tensors, text or workers.

`lifecycle.py` starts, preempts and ends sequences; `block_manager.py` allocates their blocks.
A step is planned in order:

    1. An owner (API key) that waits with far fewer places than another gets a place or blocks of
       it: see `preemption.py`.
    2. Every running sequence that is one token behind, and waits for no image, gets that token
       (a decode). If no text block is available, a running sequence is preempted.
    3. The rest of the token budget goes to running sequences that are further behind, in chunks.
    4. Waiting sequences are admitted while there is budget, a place in the batch, and blocks in
       both pools: the owner with the least service first, inside an owner by rank (priority, then
       arrival). No sequence overtakes one that lacks blocks; those whose adapter has a place
       overtake one whose adapter has none (`blocks/adapter_places.py`).

If owners want more tokens than 3 and 4 can give, each gets its part of the step by weight
(`step_budget.py`), and what one leaves goes to the others. An owner alone gets everything.

If an owner runs nothing, its short prompt may be computed alone, before the next step with the
others' decodes, or inside the running step (`insert`; `newcomer` in `preemption.py`). Then too
many sequences may run, until the next step is planned.

A step encodes a few images at most. While streams run, images use the token budget. A chunk ends
before an image that must wait for another step.

While a step is computed, the rows after it can be laid out (`plan_ahead`): decodes, and the next
chunks of prompts. The next step is planned when the result is known, and uses the rows that fit. A
chunk keeps the size that it was planned with, also if decodes have ended meanwhile.

Why there is no deadlock: one running sequence is protected (`preemption.py`). It goes first in
every step but a newcomer's, and is preempted only if it is alone; admission rejects what could not
run alone. So it ends, and the next one is protected. A sequence gets the blocks of all its known
tokens and images when it is admitted, so only step 2 can run out of blocks.

Why there is no starvation: take the request that came first of all open ones. While it waits at
the head of its owner's line, every other owner that goes before it gets service, so its owner's
counter becomes the smallest; then nothing is admitted before it, and what runs ends. Once it runs,
it is protected as soon as nothing of its owner is before it. A preempted sequence waits at its
place by rank. Two streams can starve others, and both are intended: better priorities of the same
owner, and those of a key that may cross owners.

A sequence starts behind the cached blocks of its beginning, but always computes its last token,
to sample from its logits.
"""

from __future__ import annotations

from ...models.batch import ModelInfo, ScheduledSequence, StepBatch, StepResult
from ..blocks.adapter_places import AdapterPlaces
from ..blocks.image_pool import ImageEntry
from ..blocks.tile_store import Ask, TileStore, ask_nobody
from .batch_rows import DraftRecord, RowsAhead, add_drafts, fill, row_of, rows_ahead, sampled_of
from .block_manager import BlockManager
from .interface import DraftCounts, Progress, SchedulerCounts, SchedulerLimits, SchedulerSnapshot
from .lifecycle import Lifecycle
from .preemption import Start, has_far_less, may_add, newcomer, protected, surplus, yielding
from .request_queue import RequestQueue
from .sequence import Part, Sequence
from .sequence_states import SequenceEvent, Status
from .step_budget import ImageCost, Step
from .throughput import StepTimes


class Scheduler:
    """Plans steps and applies their results, one step at a time. ask: asks workers for tiles."""

    def __init__(
        self, info: ModelInfo, limits: SchedulerLimits, queue: RequestQueue, ask: Ask = ask_nobody
    ) -> None:
        self.blocks = BlockManager(
            info.pools, prefix_cache=limits.prefix_cache, image_cache=limits.image_cache
        )
        if limits.poison_freed_blocks:
            self.blocks.record_freed()
        self._num_images_encoded, self._draft_counts = 0, DraftCounts()
        self._limits, self._info = limits, info
        self._image_cost = ImageCost(info.image_cost_tokens, info.num_image_layers)
        self.queue, self.owners = queue, queue.owners
        self.tiles = queue.tiles = TileStore(self.blocks.image_pool, ask)
        queue.places = AdapterPlaces(limits.max_loras)
        self._lifecycle = Lifecycle(self.blocks, queue, limits.max_num_seqs)
        self._running = self._lifecycle.running
        self._step: Step | None = None
        self._inserted: Step | None = None  # inside `_step`
        self._ahead = RowsAhead()
        self._partial: ImageEntry | None = None  # the runner has encoded a part of it
        self._step_times, self._drafts = StepTimes(), DraftRecord()
        self._is_newcomers = False  # the last step had a newcomer's prompt, alone or inside

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """True if a sequence runs, or one that waits can run."""
        return bool(self._running) or self.queue.has_ready

    @property
    def protected(self) -> Sequence | None:
        """The running sequence that always proceeds."""
        return protected(self._running) if self._running else None

    def snapshot(self) -> SchedulerSnapshot:
        """The state at this moment, for tests."""
        return SchedulerSnapshot.of(self.counts(), self.queue, self._running)

    def counts(self) -> SchedulerCounts:
        """Counts at this moment, for metrics: heartbeats read them while a step computes."""
        return SchedulerCounts(
            num_running=len(self._running),
            text=self.blocks.text_pool.snapshot(),
            images=self.blocks.image_pool.snapshot(),
            num_preemptions=self._lifecycle.num_preemptions,
            num_images_encoded=self._num_images_encoded,
            prefix_tokens_queried=self.blocks.num_prefix_tokens_queried,
            prefix_tokens_hit=self.blocks.num_prefix_tokens_hit,
            drafts=self._draft_counts,
        )

    def check(self) -> None:
        """Assert both pools' invariants, and that only running sequences use blocks. For tests."""
        self.blocks.check(self._running)

    # Planning a step

    def schedule(self) -> StepBatch | None:
        """The next step, or None if no sequence waits or runs.

        Pass its result to `update`, or call `fail_step`, before the next call.
        """
        assert self._step is self._inserted is None, "the last step has no result yet"
        limits, step = self._limits, Step.of(self._limits, self._image_cost)
        self._make_way()
        if not self._plan_newcomer(step):
            ahead, self._ahead = self._ahead, RowsAhead()
            self._plan_decodes(step, ahead)
            step.share(self.owners, self._running, self.queue if self._has_place else None)
            self._plan_chunks(step, ahead)
            self._admit(step)
            if step.quotas:
                step.quotas = {}  # what owners left of their parts
                self._admit(step)
            add_drafts(step, self.blocks, limits, self._info, self._drafts)
        if not step.sequences:
            assert not self.has_work, "requests wait, but none can run"
            return None
        self._step, step.copies = step, self._lifecycle.take_copies()
        return self._complete(step)

    def insert(self) -> StepBatch | None:
        """A newcomer's prompt, to compute between two layers of the running step; None if not due.

        One after the other, while the outer step has time and room; none in a newcomer's own step.
        Pass its result to `update`, or call `fail_step`, both with `is_inserted`, before the next
        call or `schedule`. It may take a place at the next step only.
        """
        limits, outer = self._limits, self._step
        is_own = outer is not None and self._is_newcomers and not outer.num_inserted
        if outer is None or self._inserted is not None or is_own:
            return None
        room, num_others = outer.room_inside(limits), outer.batch.num_tokens
        found = self._newcomer(room, num_others, outer)
        if not (found and may_add(self._running, found[0], limits.max_num_seqs, self.owners)):
            return None
        step = self._inserted = Step.of(self._limits, self._image_cost)
        self._is_newcomers = True
        self._start(step, *found)
        outer.count_inside(step.batch.num_tokens, self._step_times)
        return self._complete(step)

    def _complete(self, step: Step) -> StepBatch:
        step.batch.copies = list(step.copies.values())
        if self._limits.poison_freed_blocks:
            self.blocks.poison_freed(step.batch)
        return step.batch

    def take_started(self) -> list[Sequence]:
        """The sequences that ran for the first time since the last call."""
        return self._lifecycle.take_started()

    def _make_way(self) -> None:
        """Preempt for what was inserted, and for the next owner if it has far fewer places."""
        while len(self._running) > self._limits.max_num_seqs:
            self._lifecycle.preempt(surplus(self._running, self.owners))
        head = self.queue.peek() if len(self.owners) > 1 else None
        if head is None or not self._running or not has_far_less(head.owner, self.owners):
            return
        shared = self.blocks.cached_blocks(head, self._limits.max_num_batched_images)
        # Twice what admission leaves: the decodes of this step take blocks before it.
        lack = self.blocks.lack(head, shared, num_spare=2 * len(self._running))
        if not self._has_place or lack.is_left:
            for last in yielding(self._running, head, lack, self.owners):
                self._lifecycle.preempt(last)

    def _plan_newcomer(self, step: Step) -> bool:
        """Start a newcomer's prompt alone in this step, if that is due; never twice in a row."""
        was_alone, self._is_newcomers = self._is_newcomers, False
        if was_alone or not self._has_place:
            return False
        found = self._newcomer(step.budget, sum(one.is_decoding for one in self._running))
        if found is not None:
            self._ahead, self._is_newcomers = RowsAhead(), True
            self._start(step, *found)
        return found is not None

    def _newcomer(self, budget: int, num_others: int, inside: Step | None = None) -> Start | None:
        known = self.queue, self._running, self.blocks, self._step_times
        return newcomer(*known, budget, num_others, inside=inside)

    @property
    def _has_place(self) -> bool:
        return len(self._running) < self._limits.max_num_seqs

    def _plan_decodes(self, step: Step, ahead: RowsAhead) -> None:
        decoding = [sequence for sequence in self._running if sequence.is_decoding]
        for sequence in decoding:
            # It may have been preempted for an earlier one.
            if sequence.status is Status.RUNNING:
                self._lifecycle.grow(sequence)
        for sequence in decoding:
            if sequence.status is Status.RUNNING:
                self._plan(step, sequence, ahead.get(sequence))
        step.has_streams = bool(step.sequences)
        step.budget -= min(step.budget, ahead.num_spare)

    def _plan_chunks(self, step: Step, ahead: RowsAhead) -> None:
        behind = [sequence for sequence in self._running if not sequence.is_in_step]
        if len({sequence.owner for sequence in behind}) > 1:
            first = protected(self._running)
            # The runner keeps one partial image: another one would cost it.
            behind.sort(
                key=lambda one: (
                    one is not first,
                    self._partial not in one.images,
                    self.owners.turn(one.owner),
                )
            )
        for sequence in behind:
            if step.room(sequence.owner) > 0:
                self._plan(step, sequence, ahead.get(sequence))

    def _admit(self, step: Step) -> None:
        while step.budget > 0 and self._has_place:
            sequence = self.queue.next(step.has_room)
            if sequence is None:
                return
            max_num_images = self._limits.max_num_batched_images
            shared = self.blocks.cached_blocks(sequence, max_num_images)
            # One block stays available for each running sequence, so that the next decodes do not
            # preempt the new sequence at once.
            if not self.blocks.can_start(sequence, shared, num_spare=len(self._running)):
                return
            if not step.can_begin_image(sequence.owner) and not self.blocks.has_images(sequence):
                return  # it would only occupy blocks while its images wait
            self._start(step, sequence, shared)

    def _start(self, step: Step, sequence: Sequence, shared: list[int]) -> None:
        """Give a waiting sequence its place and its blocks, and plan its first tokens."""
        self.queue.remove(sequence)
        self.blocks.start(sequence, shared)
        self._lifecycle.run(sequence, SequenceEvent.ADMIT)
        self._plan(step, sequence)

    def _plan(self, step: Step, sequence: Sequence, ahead: ScheduledSequence | None = None) -> None:
        """Add as many of the next tokens of `sequence` to the step as its budgets allow.

        ahead: the row of its next tokens, if it was laid out while the last step ran: no more.
        """
        start, owner = sequence.num_computed_tokens, sequence.owner
        num_due = sequence.num_uncomputed_tokens if ahead is None else len(ahead.token_ids)
        end = start + min(num_due, step.room(owner))
        end = step.plan_images(sequence, start, end, self.tiles, self.owners)
        end = min(end, start + step.room(owner))  # images may have used some of it
        if end == start:
            return
        if ahead is None or len(ahead.token_ids) != end - start:
            ahead = row_of(sequence, start, end, self.blocks.num_blocks(end))
        row = ahead
        assert row.start == start, "a row was planned ahead for other tokens"
        fill(row, sequence)
        step.batch.sequences.append(row)
        step.sequences.append(sequence)
        step.spend(owner, end - start)
        self.owners.charge_positions(sequence, start, end)
        sequence.is_in_step = True

    def plan_ahead(self) -> list[ScheduledSequence]:
        """While a step is computed: the rows of the step after it; decodes first, then chunks.

        The tokens of decodes are not known yet. The next `schedule` uses the rows of sequences that
        continue. See `has_all_ahead`.
        """
        assert self._step is not None, "no step is being computed"
        self._ahead = rows_ahead(self._step, self._running, self.blocks, self._limits)
        return [*self._ahead.decodes.values(), *self._ahead.chunks.values()]

    @property
    def has_all_ahead(self) -> bool:
        """Whether the next step has the rows of `plan_ahead` and no others, if none can start."""
        return self._ahead.is_complete

    # Changing states

    def make_ready(self, sequence: Sequence, part: Part) -> None:
        """Give a sequence the matcher or the adapter that it waits for."""
        sequence.take(part)
        if sequence.status is Status.WAITING:
            self.queue.make_ready(sequence)

    def abort(self, sequence: Sequence) -> Progress | None:
        """End `sequence` early; None if it ends with the step that is being computed."""
        if sequence.is_finished:
            return None
        if sequence.is_in_step:
            sequence.is_aborted = True
            return None
        self._lifecycle.finish(sequence, SequenceEvent.ABORT)
        return Progress(sequence, [], "abort")

    # Applying results

    def update(
        self, result: StepResult, seconds: float | None = None, is_inserted: bool = False
    ) -> list[Progress]:
        """Apply the result of a planned step; returns what it changed, but chunks of prompts.

        seconds: how long the step took by itself, if it was measured.
        """
        step = self._end_step(is_inserted)
        if seconds is not None and not step.batch.images:
            self._step_times.record(step.batch.num_tokens, seconds)
            if self._limits.num_speculative_tokens:
                self._drafts.record_decodes(step.batch, result, seconds)
        step.share_vision(result.vision_seconds)
        self._partial = step.record_images(self._partial, self.tiles)
        self._num_images_encoded += len(step.due_images) - len(step.loaded)
        rows = zip(step.sequences, step.batch.sequences, strict=True)
        changes = (self._advance(*row, result) for row in rows)
        return [progress for progress in changes if progress is not None]

    def fail_step(self, is_inserted: bool = False) -> list[Sequence]:
        """End and return the sequences of a planned step, whose computation failed.

        Its images stay unencoded, so other sequences encode them again. Sequences that wait for a
        copy from this step compute those tokens instead.
        """
        step = self._end_step(is_inserted)
        if not is_inserted:
            step.forget_images(self._partial)
            self._partial, self._ahead = None, RowsAhead()
        for sequence in step.sequences:
            self._lifecycle.finish(sequence, SequenceEvent.FAIL)
        for sequence in step.copies:
            if sequence.status is Status.RUNNING:
                self._lifecycle.preempt(sequence)
        return step.sequences

    def _end_step(self, is_inserted: bool) -> Step:
        if is_inserted:
            step, self._inserted = self._inserted, None
        else:
            step, self._step = self._step, None
        assert step is not None, "there is no step to end"
        for sequence in step.sequences:
            sequence.is_in_step = False
        return step

    def _advance(
        self, sequence: Sequence, planned: ScheduledSequence, result: StepResult
    ) -> Progress | None:
        sequence.num_computed_tokens += len(planned.token_ids) - planned.num_drafts
        self.blocks.commit(sequence)
        if planned.prompt is not None and sequence.prompt_logprobs is not None:
            sequence.prompt_logprobs += result.prompt_logprobs[sequence.sequence_id]
        if planned.sampling is not None:
            self._lifecycle.fork(sequence)
        if sequence.is_aborted:
            self._lifecycle.finish(sequence, SequenceEvent.ABORT)
            return Progress(sequence, [], "abort")
        if planned.sampling is None:
            return None
        return self._append(sequence, planned, result)

    def _append(
        self, sequence: Sequence, planned: ScheduledSequence, result: StepResult
    ) -> Progress:
        """Add the sampled token, and those behind drafts that were right."""
        sampled = sampled_of(result, sequence.sequence_id)
        added = sequence.extend(sampled.token_ids, self._limits.max_model_len)
        num_added = len(added.token_ids)
        if planned.num_drafts:
            self._draft_counts.add(planned.num_drafts, num_added - 1)
            sequence.num_computed_tokens += num_added - 1
            self.owners.charge_positions(sequence, planned.start, sequence.num_computed_tokens)
            self.blocks.commit(sequence)
        if added.finish_reason is not None:
            self._lifecycle.finish(sequence, SequenceEvent.FINISH)
        stop, logprobs = sequence.matched_stop_token_id(), sampled.logprobs[:num_added]
        return Progress(sequence, added.token_ids, added.finish_reason, stop, logprobs)
