"""One sequence's part of one step, in the form that the runner takes.

Owns how a sequence's state becomes a row of the batch, which rows get drafts behind their token
(`add_drafts`), and which rows the step after the running one will have (`rows_ahead`). Knows
nothing of the order of sequences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ...models.batch import (
    Accepted,
    ModelInfo,
    SamplingContext,
    ScheduledSequence,
    StepBatch,
    StepResult,
)
from ..blocks.visibility import cut_segments, is_seen
from .block_manager import BlockManager
from .drafts.draft_source import DraftSource, Shares
from .interface import SchedulerLimits
from .sequence import Sequence
from .sequence_states import Status
from .step_budget import Step
from .throughput import DraftTimes

# a token that is still being sampled
_UNKNOWN = 0
# Tokens of a step with drafts, at most: each has a row of logits, and more were not measured.
MOST_TOKENS = 64
# Steps in a row that look nothing up, at most, where likely drafts were not worth their time.
MOST_WITHOUT = 7


def row_of(sequence: Sequence, start: int, end: int, num_blocks: int) -> ScheduledSequence:
    """The row of positions start .. end - 1, in the sequence's first `num_blocks` blocks.

    `fill` adds what depends on its tokens, so the row may include the token after the newest one.
    """
    is_sampled, num_tokens = end >= sequence.num_tokens, max(end, sequence.num_tokens)
    return ScheduledSequence(
        request_id=sequence.sequence_id,
        token_ids=[_UNKNOWN] * (end - start),
        start=start,
        block_ids=sequence.table.first(sequence.block_ids, num_blocks),
        segments=cut_segments(
            sequence.request.spans, [entry.block_ids for entry in sequence.images], start, end
        ),
        sampling=sequence.sampling if is_sampled else None,
        sample_index=num_tokens - len(sequence.request.prompt_token_ids),
        matcher=sequence.matcher if is_sampled else None,
        prompt=sequence.prompt_targets(start, end),
        adapter=sequence.adapter_digest,
    )


def fill(row: ScheduledSequence, sequence: Sequence) -> None:
    """Add the row's token ids, which are known now, and the context of its sampling."""
    row.token_ids = sequence.token_ids[row.start : row.start + len(row.token_ids)]
    if row.sampling is not None:
        row.context = sequence.sampling_context()


@dataclass(slots=True)
class RowsAhead:
    """Rows for the step after the running one.

    decodes: of sequences that get a token in the running step; without that token. chunks: the next
    tokens of prompts, with these. is_complete: the next step has these rows and no others, but for
    those of answers that end, unless it is planned for what happens meanwhile.
    """

    decodes: dict[Sequence, ScheduledSequence] = field(default_factory=dict)
    chunks: dict[Sequence, ScheduledSequence] = field(default_factory=dict)
    is_complete: bool = False

    def get(self, sequence: Sequence) -> ScheduledSequence | None:
        """The row of a sequence that has kept its blocks since."""
        return self.decodes.get(sequence) or self.chunks.get(sequence)

    @property
    def num_spare(self) -> int:
        """How many tokens of the next step stay unused, so that its chunks are those planned here.

        Those of the decodes that ended; 0 if a prompt's sequence ended.
        """
        if not self.chunks or any(one.status is not Status.RUNNING for one in self.chunks):
            return 0
        return sum(one.status is not Status.RUNNING for one in self.decodes)


def rows_ahead(
    step: Step, running: list[Sequence], blocks: BlockManager, limits: SchedulerLimits
) -> RowsAhead:
    """The rows of the step after `step`, which is being computed.

    A block that a decode needs is allocated now; without a free block there is no row.
    """
    rows = dict(zip(step.sequences, step.batch.sequences, strict=True))
    found = RowsAhead(is_complete=not limits.num_speculative_tokens)
    behind: list[Sequence] = []
    for sequence in running:
        row = rows.get(sequence)
        if row is None or row.sampling is None:
            behind.append(sequence)
        elif (
            not row.num_drafts
            and sequence.may_continue(limits.max_model_len)
            and blocks.grow_ahead(sequence)
        ):
            start = sequence.num_tokens
            num_blocks = blocks.num_blocks(start + 1)
            found.decodes[sequence] = row_of(sequence, start, start + 1, num_blocks)
        else:
            found.is_complete = False
    if found.is_complete:
        _add_chunks(found, step, behind, blocks, limits.max_num_batched_tokens)
    return found


def _add_chunks(
    found: RowsAhead, step: Step, behind: list[Sequence], blocks: BlockManager, budget: int
) -> None:
    """Add the next chunks of sequences that are behind, as `schedule` will plan them."""
    rows = dict(zip(step.sequences, step.batch.sequences, strict=True))
    budget -= len(found.decodes)
    starts = [
        one.num_computed_tokens + (len(rows[one].token_ids) if one in rows else 0) for one in behind
    ]
    num_wanted = sum(one.num_tokens - start for one, start in zip(behind, starts, strict=True))
    if len({one.owner for one in behind}) > 1 and num_wanted > budget:
        found.is_complete = False  # owners share the step by what each has used until then
        return
    for sequence, start in zip(behind, starts, strict=True):
        end = min(sequence.num_tokens, start + budget)
        if end == start:
            return
        if not _is_known(sequence, step, start, end):
            found.is_complete = False
            return
        row = found.chunks[sequence] = row_of(sequence, start, end, blocks.num_blocks(end))
        fill(row, sequence)
        budget -= end - start


def _is_known(sequence: Sequence, step: Step, start: int, end: int) -> bool:
    """Whether these positions can be planned while `step` is computed.

    Not if the sequence ends with it, if its images must be encoded first, or if it reports the
    prompt's log-probabilities, which begin where those of `step` end.
    """
    images = zip(sequence.images, sequence.request.spans, strict=True)
    return (
        not sequence.is_aborted
        and sequence.prompt_logprobs is None
        and all(
            entry.is_encoded or entry in step.due_images or not is_seen(span, start, end)
            for entry, span in images
        )
    )


@dataclass(slots=True)
class DraftRecord:
    """What steps showed of drafts: their times, and the shares of right ones."""

    times: DraftTimes = field(default_factory=DraftTimes)
    shares: Shares = field(default_factory=Shares)
    num_expected: float = 0.0  # of the running step's drafts, to be right
    num_without: int = 0  # the next steps that look nothing up

    def record_decodes(self, batch: StepBatch, result: StepResult, seconds: float) -> None:
        """Record the time of a step of decodes alone, and how many of its drafts were right."""
        if _has_decodes_alone(batch):
            num_decodes = len(batch.sequences)
            num_right = sum(len(one.token_ids) for one in result.accepted.values())
            self.times.record(num_decodes, batch.num_tokens - num_decodes, seconds)
            self.times.record_right(num_right, self.num_expected)

    def num_worth(
        self, sequences: list[Sequence], chances: Callable[[DraftSource], list[float]], most: int
    ) -> int:
        """How many drafts with these chances of each request are worth their time, up to `most`."""
        found = [
            chance
            for sequence in sequences
            if sequence.drafts is not None
            for chance in chances(sequence.drafts)
        ]
        found.sort(reverse=True)
        return self.times.num_worth(len(sequences), found[:most])


def add_drafts(
    step: Step, blocks: BlockManager, limits: SchedulerLimits, info: ModelInfo, record: DraftRecord
) -> None:
    """Put drafts behind the decodes of a planned step of decodes alone, as many as pay.

    Nothing is preempted for drafts, and they change no answer. The likeliest come first.
    """
    rows, record.num_expected = step.batch.sequences, 0.0
    most = min(step.budget, MOST_TOKENS - len(rows)) if limits.num_speculative_tokens else 0
    if most < 1 or not record.times.are_known(len(rows)) or not _has_decodes_alone(step.batch):
        return
    if record.num_without:
        record.num_without -= 1
        return
    found = [_find_drafts(sequence, limits, info, record.shares) for sequence in step.sequences]
    if not (num_drafts := record.num_worth(step.sequences, DraftSource.chances, most)):
        is_hopeless = not record.num_worth(step.sequences, DraftSource.highest_chances, most)
        record.num_without = min(len(rows) // (2 if is_hopeless else 8), MOST_WITHOUT)
        return
    chances = [
        (chance, place)
        for place, sequence in enumerate(step.sequences)
        if sequence.drafts is not None
        for chance in sequence.drafts.chances()
    ]
    chances.sort(reverse=True)
    for place, count in Counter(place for _, place in chances[:num_drafts]).items():
        sequence = step.sequences[place]
        # As at admission, a block stays available for each sequence of the step.
        drafts = found[place][: blocks.grow_for_drafts(sequence, count, len(rows))]
        if drafts and sequence.drafts is not None:
            record.num_expected += sum(sequence.drafts.chances()[: len(drafts)])
            num_blocks = blocks.num_blocks(sequence.num_tokens + len(drafts))
            rows[place] = _with_drafts(rows[place], sequence, drafts, num_blocks)
            step.spend(sequence.owner, len(drafts))


def sampled_of(result: StepResult, sequence_id: str) -> Accepted:
    """All tokens that a step sampled for a sequence, with their log-probabilities."""
    more = result.accepted.get(sequence_id, Accepted([], []))
    first = result.logprobs.get(sequence_id)
    return Accepted(
        [result.token_ids[sequence_id], *more.token_ids],
        [] if first is None else [first, *more.logprobs],
    )


def _has_decodes_alone(batch: StepBatch) -> bool:
    """Whether a step has the newest generated token of each sequence, drafts, and nothing else."""
    is_moving = batch.images or batch.loads or batch.copies
    return not is_moving and all(
        row.sampling is not None
        and row.sample_index > 0
        and len(row.token_ids) == 1 + row.num_drafts
        for row in batch.sequences
    )


def _find_drafts(
    sequence: Sequence, limits: SchedulerLimits, info: ModelInfo, shares: Shares
) -> list[int]:
    most = sequence.num_drafts_allowed(limits.max_model_len)
    if sequence.drafts is None:
        sequence.drafts = DraftSource(limits.num_speculative_tokens, info.vocab_size, shares)
    ends = sequence.end_token_ids | sequence.stop_token_ids
    return sequence.drafts.next(sequence.token_ids, sequence.matcher, ends, most)


def _with_drafts(
    row: ScheduledSequence, sequence: Sequence, drafts: list[int], num_blocks: int
) -> ScheduledSequence:
    """A decode's row with drafts behind its token, in the sequence's first `num_blocks` blocks.

    The given row is unchanged: it may have been laid out ahead.
    """
    contexts: list[SamplingContext | None] = []
    if row.context is not None:
        contexts = [sequence.sampling_context(drafts[: i + 1]) for i in range(len(drafts))]
    image_blocks = [entry.block_ids for entry in sequence.images]
    end = row.start + 1 + len(drafts)
    return replace(
        row,
        token_ids=[*row.token_ids, *drafts],
        block_ids=sequence.table.first(sequence.block_ids, num_blocks),
        segments=cut_segments(sequence.request.spans, image_blocks, row.start, end),
        num_drafts=len(drafts),
        draft_contexts=contexts,
    )
