"""Decides which tokens run next. Knows nothing of tensors, text or workers.

Owns the sequences that run; `block_manager.py` moves their blocks. One step is planned so:

    1. every running sequence that is one token behind, and waits for no image, gets that
       token (a decode); if the text pool is empty the last running one is preempted for it
    2. what is left of the token budget goes to running sequences that are further
       behind, oldest first, in chunks
    3. waiting requests are admitted, by priority and then first come first served,
       while there is budget, a place and room in both pools

A step encodes a few images at most, and while others decode no more of them than would
take as long as a full chunk (`step_budget.py`): a chunk ends before an image that has to wait
for another step.

While a step is computed, the decodes behind it can be laid out (`plan_ahead`). That decides
nothing: the next step is planned when the result is in, and takes what is ready.

Why this cannot deadlock, nor starve anyone: `running` is in the order of priority
and arrival, and only its last member is ever preempted, so the first always
proceeds; a preempted sequence waits before everyone who came after it; and
admission refuses what could not run alone. Among equal priorities nobody is passed
over; an endless stream of better priority does hold up the others: that is what it
says. A sequence is given the blocks of all its known tokens and of its images when
it is admitted, so only step 1 can run out.

A sequence starts behind the full blocks that the text pool still has of its
beginning, but computes its last token in any case: something must be sampled from.

Further answers to the same prompt follow the first one: when it has computed the
prompt they fork, on references to its full blocks and a copy of its last one, and
compute the prompt's last token to sample from, before whoever waits, of whatever
priority: their request runs already. Those without room, or whose leader has gone,
wait as if they had just been preempted.

`sequence_states.py` lists the states of a sequence and the events that change them.
"""

from __future__ import annotations

import bisect
import time
from dataclasses import dataclass

from ...models.batch import (
    BlockCopy,
    ModelInfo,
    ScheduledSequence,
    StepBatch,
    StepResult,
    TokenLogprobs,
    TokenMatcher,
)
from ..blocks.block_pool import ImageEntry
from ..blocks.visibility import is_seen
from ..messages import FinishReason
from .batch_rows import fill, row_of
from .block_manager import BlockManager
from .request_queue import RequestQueue
from .sequence import Sequence
from .sequence_states import SequenceEvent, Status
from .step_budget import ImageCost, Step


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """How much one step may hold, how long a sequence may grow, and what is kept after use."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_batched_images: int
    max_model_len: int
    prefix_cache: bool = True
    image_cache: bool = True
    poison_freed_blocks: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step, or an abort, brought for one sequence."""

    sequence: Sequence
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    logprobs: TokenLogprobs | None = None


class Scheduler:
    """Plans steps and takes in their results; one step at a time."""

    def __init__(self, info: ModelInfo, limits: SchedulerLimits, queue: RequestQueue) -> None:
        self.blocks = BlockManager(
            info.pools, prefix_cache=limits.prefix_cache, image_cache=limits.image_cache
        )
        if limits.poison_freed_blocks:
            self.blocks.text_pool.note_freed()
            self.blocks.image_pool.blocks.note_freed()
        self.num_preemptions = 0
        self.num_images_encoded = 0
        self._limits = limits
        self._image_cost = ImageCost(info.image_cost_tokens, info.num_image_layers)
        self._waiting = queue
        self._running: list[Sequence] = []
        self._begun: list[Sequence] = []
        self._copies: dict[Sequence, BlockCopy] = {}
        self._step: Step | None = None
        # The rows that `plan_ahead` made of the decodes behind the running step.
        self._ahead: dict[Sequence, ScheduledSequence] = {}
        # The one image of which the runner keeps a part.
        self._partial: ImageEntry | None = None

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._running) or self._waiting.peek() is not None

    # Planning a step

    def schedule(self) -> StepBatch | None:
        """The next step, or None if nothing waits or runs.

        Hand its result to `update`, or call `fail_step`, before the next call.
        """
        assert self._step is None, "the last step has no result yet"
        limits = self._limits
        step = Step(limits.max_num_batched_tokens, limits.max_num_batched_images, self._image_cost)
        self._plan_decodes(step)
        self._plan_chunks(step)
        self._admit(step)
        if not step.sequences:
            assert not self.has_work, "requests wait, but none can run"
            return None
        step.copies, self._copies = self._copies, {}
        step.batch.copies = list(step.copies.values())
        self._name_freed(step.batch)
        self._step = step
        return step.batch

    def take_begun(self) -> list[Sequence]:
        """Those that ran for the first time since this was last asked."""
        begun, self._begun = self._begun, []
        return begun

    def _name_freed(self, batch: StepBatch) -> None:
        """In the debug mode: have the step poison what was freed since the last one."""
        # A copy's target was written just before.
        targets = {copy.target for copy in batch.copies}
        freed = self.blocks.text_pool.take_freed()
        batch.freed_text_blocks = [one for one in freed if one not in targets]
        batch.freed_image_blocks = self.blocks.image_pool.blocks.take_freed()

    def _plan_decodes(self, step: Step) -> None:
        ahead, self._ahead = self._ahead, {}
        for sequence in list(self._running):
            # A sequence later in the copy may have been preempted for an earlier one.
            if sequence.status is Status.RUNNING and sequence.is_decoding:
                self._give_room(sequence)
                if sequence.status is Status.RUNNING:
                    self._plan(step, sequence, ahead.get(sequence))
        step.has_streams = bool(step.sequences)

    def _plan_chunks(self, step: Step) -> None:
        for sequence in self._running:
            if step.budget == 0:
                return
            if not sequence.is_in_step:
                self._plan(step, sequence)

    def _admit(self, step: Step) -> None:
        while step.budget > 0 and len(self._running) < self._limits.max_num_seqs:
            sequence = self._waiting.peek()
            if sequence is None:
                return
            max_num_images = self._limits.max_num_batched_images
            shared = self.blocks.cached_blocks(sequence, max_num_images)
            # One free block is left for each that runs, so that the newcomer is not
            # preempted again by the next decodes of its elders.
            if not self.blocks.can_start(sequence, shared, num_spare=len(self._running)):
                return
            if not step.can_begin_image and not all(
                self.blocks.image_pool.has_encoded(key) for key in sequence.image_keys
            ):
                return  # it would hold blocks and wait for its images
            self._waiting.remove(sequence)
            self.blocks.start(sequence, shared)
            self._run(sequence, SequenceEvent.ADMIT)
            self._plan(step, sequence)

    def _plan(self, step: Step, sequence: Sequence, ahead: ScheduledSequence | None = None) -> None:
        """Put as many of the next tokens of `sequence` into the step as its budgets allow.

        ahead: the row of its one next token, where that was planned while the last step ran.
        """
        start = sequence.num_computed_tokens
        end = start + min(sequence.num_uncomputed_tokens, step.budget)
        end = self._plan_images(step, sequence, start, end)
        end = min(end, start + step.budget)  # images may have taken some of it
        if end == start:
            return
        row = ahead or self._row(sequence, start, end)
        fill(row, sequence)
        step.batch.sequences.append(row)
        step.sequences.append(sequence)
        step.budget -= end - start
        sequence.is_in_step = True

    def _row(self, sequence: Sequence, start: int, end: int) -> ScheduledSequence:
        return row_of(sequence, start, end, self.blocks.num_blocks(end))

    def _plan_images(self, step: Step, sequence: Sequence, start: int, end: int) -> int:
        """Encode what these positions see and no step has encoded, once.

        Returns where the chunk ends: before the first image that has to wait for another
        step, or for its last part. That image may start before `start` where the tokens
        from there on came from the prefix cache.
        """
        for entry, span in zip(sequence.images, sequence.request.spans, strict=True):
            if not entry.is_encoded and is_seen(span, start, end) and not step.encode(entry):
                return max(span.start, start)
        return end

    def plan_ahead(self) -> list[ScheduledSequence]:
        """While a step is computed: the rows of the decodes that will follow it.

        All but their tokens, which are being sampled. The next `schedule` takes those that
        then go on; a block that such a row needs is taken now, unless none is free.
        """
        assert self._step is not None, "no step is being computed"
        rows = zip(self._step.sequences, self._step.batch.sequences, strict=True)
        sampled = {sequence for sequence, row in rows if row.sampling is not None}
        self._ahead = {
            sequence: self._row(sequence, sequence.num_tokens, sequence.num_tokens + 1)
            for sequence in self._running
            if sequence in sampled
            and sequence.may_go_on(self._limits.max_model_len)
            and self.blocks.grow_ahead(sequence)
        }
        return list(self._ahead.values())

    # Who runs, waits or is gone

    def _run(self, sequence: Sequence, event: SequenceEvent) -> None:
        sequence.move(event)
        if sequence.ran_at is None:
            sequence.ran_at = time.monotonic()
            self._begun.append(sequence)
        bisect.insort(self._running, sequence, key=lambda one: one.rank)

    def _fork(self, leader: Sequence) -> None:
        """Start the followers of `leader`, which has just computed its prompt, beside it.

        One free block is left for each that runs, as at admission.
        """
        followers, leader.followers = leader.followers, []
        for follower in followers:
            follower.leader = None
            has_place = len(self._running) < self._limits.max_num_seqs
            if not has_place or not self.blocks.can_fork(num_spare=len(self._running)):
                self._wait(follower, SequenceEvent.DETACH)
                continue
            copy = self.blocks.fork(leader, follower)
            if copy is not None:
                self._copies[follower] = copy
            self._run(follower, SequenceEvent.FORK)

    def _wait(self, sequence: Sequence, event: SequenceEvent) -> None:
        sequence.move(event)
        self._waiting.put_back(sequence)

    def _release_followers(self, leader: Sequence) -> None:
        """Let the followers of a leader that ends before its prompt compute it themselves."""
        followers, leader.followers = leader.followers, []
        for follower in followers:
            follower.leader = None
            self._wait(follower, SequenceEvent.DETACH)

    def _give_room(self, sequence: Sequence) -> None:
        """Cover the newest token with a block, preempting from the last sequence on.

        The last may be `sequence` itself: it then waits for those before it.
        """
        while not self.blocks.can_grow(sequence):
            last = self._running[-1]
            self._preempt(last)
            if last is sequence:
                return
        self.blocks.grow(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        assert not sequence.is_in_step, "a planned sequence is never preempted"
        self._leave(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._wait(sequence, SequenceEvent.PREEMPT)

    def _finish(self, sequence: Sequence, event: SequenceEvent) -> None:
        """End a sequence that runs or waits, and let its followers, if any, go on alone."""
        if sequence.status is Status.RUNNING:
            self._leave(sequence)
        elif sequence.leader is not None:
            sequence.leader.followers.remove(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.move(event)
        self._release_followers(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Take a running sequence out and give up both kinds of its blocks."""
        assert sequence.status is Status.RUNNING
        self._running.remove(sequence)
        self._copies.pop(sequence, None)
        self.blocks.release(sequence)

    # Taking in what happened

    def update(self, result: StepResult) -> list[Progress]:
        """Take in the result of the step that `schedule` planned; what it brought to whom.

        Sequences that merely computed a chunk of their prompt are left out.
        """
        step = self._end_step()
        self._take_images(step)
        advanced = zip(step.sequences, step.batch.sequences, strict=True)
        progress = (self._advance(sequence, planned, result) for sequence, planned in advanced)
        return [one for one in progress if one is not None]

    def _take_images(self, step: Step) -> None:
        """Note how far the step has encoded its images."""
        for entry in step.due_images:
            entry.is_encoded = True
        self.num_images_encoded += len(step.due_images)
        if self._partial in step.due_images:
            self._partial = None
        if step.partial is not None:
            if self._partial is not None:
                self._partial.num_layers = 0  # the runner keeps the newest part alone
            step.partial.num_layers, self._partial = step.partial_end, step.partial

    def fail_step(self) -> list[Sequence]:
        """End every sequence of the planned step, whose computation failed; those sequences.

        Its images stay unencoded: whoever else needs them has them encoded again. Who
        waited for a copy that the step was to make computes it instead.
        """
        step = self._end_step()
        for entry in (self._partial, step.partial, *step.due_images):
            if entry is not None:
                entry.num_layers = 0
        self._partial, self._ahead = None, {}
        for sequence in step.sequences:
            self._finish(sequence, SequenceEvent.FAIL)
        for sequence in step.copies:
            if sequence.status is Status.RUNNING:
                self._preempt(sequence)
        return step.sequences

    def let_on(self, sequence: Sequence, matcher: TokenMatcher) -> None:
        """Give a sequence the matcher that it waits for; it takes its turn from now on."""
        sequence.matcher = matcher
        if sequence.status is Status.WAITING:
            self._waiting.let_on(sequence)

    def abort(self, sequence: Sequence) -> Progress | None:
        """End `sequence` early; None if it ends with the step that is being computed."""
        if sequence.is_finished:
            return None
        if sequence.is_in_step:
            sequence.is_aborted = True
            return None
        self._finish(sequence, SequenceEvent.ABORT)
        return Progress(sequence, [], "abort")

    def _end_step(self) -> Step:
        step, self._step = self._step, None
        assert step is not None, "there is no step to end"
        for sequence in step.sequences:
            sequence.is_in_step = False
        return step

    def _advance(
        self, sequence: Sequence, planned: ScheduledSequence, result: StepResult
    ) -> Progress | None:
        sequence.num_computed_tokens += len(planned.token_ids)
        self.blocks.keep(sequence)
        if planned.prompt is not None and sequence.prompt_logprobs is not None:
            sequence.prompt_logprobs += result.prompt_logprobs[sequence.sequence_id]
        if planned.sampling is not None:
            self._fork(sequence)
        if sequence.is_aborted:
            self._finish(sequence, SequenceEvent.ABORT)
            return Progress(sequence, [], "abort")
        if planned.sampling is None:
            return None
        token_id = result.token_ids[sequence.sequence_id]
        logprobs = result.logprobs.get(sequence.sequence_id)
        finish_reason = sequence.append(token_id, self._limits.max_model_len)
        if finish_reason is None:
            return Progress(sequence, [token_id], logprobs=logprobs)
        self._finish(sequence, SequenceEvent.FINISH)
        stop_token_id = sequence.matched_stop_token_id()
        return Progress(sequence, [token_id], finish_reason, stop_token_id, logprobs)

    def check(self) -> None:
        """Assert that blocks are held by running sequences alone. For tests and debugging."""
        self.blocks.check(self._running)
