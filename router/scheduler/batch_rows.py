"""One sequence's part of one step, in the form that the runner takes.

Owns how a sequence's state becomes a row of the batch, and which rows get drafts behind their
token (`add_drafts`). Knows nothing of the order of sequences.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from ...models.batch import (
    Accepted,
    ModelInfo,
    SamplingContext,
    ScheduledSequence,
    StepBatch,
    StepResult,
)
from ..blocks.visibility import cut_segments
from .block_manager import BlockManager
from .drafts.draft_source import DraftSource
from .interface import SchedulerLimits
from .sequence import Sequence
from .step_budget import Step
from .throughput import DraftTimes

# a token that is still being sampled
_UNKNOWN = 0
# Tokens of a step with drafts, at most: each has a row of logits, and more were not measured.
MOST_TOKENS = 64


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


def add_drafts(
    step: Step, blocks: BlockManager, limits: SchedulerLimits, info: ModelInfo, times: DraftTimes
) -> None:
    """Put drafts behind the decodes of a planned step of decodes alone, as many as pay.

    Nothing is preempted for drafts, and they change no answer. The likeliest come first.
    """
    rows = step.batch.sequences
    if not limits.num_speculative_tokens or not _has_decodes_alone(step.batch):
        return
    found = [_find_drafts(sequence, limits, info) for sequence in step.sequences]
    chances = [
        (chance, place)
        for place, sequence in enumerate(step.sequences)
        if found[place] and sequence.drafts is not None
        for chance in sequence.drafts.chances()
    ]
    chances = sorted(chances, reverse=True)[: max(0, min(step.budget, MOST_TOKENS - len(rows)))]
    num_drafts = times.num_worth(len(rows), [chance for chance, _ in chances])
    for place, count in Counter(place for _, place in chances[:num_drafts]).items():
        sequence = step.sequences[place]
        # As at admission, a block stays available for each sequence of the step.
        drafts = found[place][: blocks.grow_for_drafts(sequence, count, len(rows))]
        if drafts:
            num_blocks = blocks.num_blocks(sequence.num_tokens + len(drafts))
            rows[place] = _with_drafts(rows[place], sequence, drafts, num_blocks)
            step.spend(sequence.owner, len(drafts))


def record_decodes(
    batch: StepBatch, seconds: float, limits: SchedulerLimits, times: DraftTimes
) -> None:
    """Record the time of a step, if it had decodes alone and may have drafts."""
    if limits.num_speculative_tokens and _has_decodes_alone(batch):
        times.record(len(batch.sequences), batch.num_tokens - len(batch.sequences), seconds)


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


def _find_drafts(sequence: Sequence, limits: SchedulerLimits, info: ModelInfo) -> list[int]:
    most = sequence.num_drafts_allowed(limits.max_model_len)
    if most < 1:
        return []
    if sequence.drafts is None:
        sequence.drafts = DraftSource(limits.num_speculative_tokens, info.vocab_size)
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
