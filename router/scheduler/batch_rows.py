"""One sequence's part of one step, in the form that the runner takes.

Owns how a sequence's state becomes a row of the batch, and which rows get drafts behind their
token (`add_drafts`). Knows nothing of the order of sequences.
"""

from __future__ import annotations

from dataclasses import replace

from ...models.batch import Accepted, ModelInfo, SamplingContext, ScheduledSequence, StepResult
from ..blocks.visibility import cut_segments
from .block_manager import BlockManager
from .drafts.draft_length import room_for_drafts
from .drafts.draft_source import DraftSource
from .interface import SchedulerLimits
from .sequence import Sequence
from .step_budget import Step

# a token that is still being sampled
_UNKNOWN = 0


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


def add_drafts(step: Step, blocks: BlockManager, limits: SchedulerLimits, info: ModelInfo) -> None:
    """Put drafts behind the decodes of a planned step, as its budget and its size allow.

    Nothing is preempted for drafts, and they change no answer. Equal parts for all decodes.
    """
    if not limits.num_speculative_tokens:
        return
    room = min(step.budget, room_for_drafts(step.batch.num_tokens, info.device))
    decodes = [place for place, row in enumerate(step.batch.sequences) if _is_decode(row)]
    part = -(-room // len(decodes)) if decodes else 0
    for place in decodes:
        sequence, row = step.sequences[place], step.batch.sequences[place]
        most = min(part, room, sequence.num_drafts_allowed(limits.max_model_len))
        if most < 1:
            continue
        if sequence.drafts is None:
            sequence.drafts = DraftSource(limits.num_speculative_tokens, info.vocab_size)
        ends = sequence.end_token_ids | sequence.stop_token_ids
        drafts = sequence.drafts.next(sequence.token_ids, sequence.matcher, ends, most)
        # As at admission, a block stays available for each sequence of the step.
        drafts = drafts[: blocks.grow_for_drafts(sequence, len(drafts), len(step.sequences))]
        if drafts:
            num_blocks = blocks.num_blocks(sequence.num_tokens + len(drafts))
            step.batch.sequences[place] = _with_drafts(row, sequence, drafts, num_blocks)
            step.spend(sequence.owner, len(drafts))
            room -= len(drafts)


def sampled_of(result: StepResult, sequence_id: str) -> Accepted:
    """All tokens that a step sampled for a sequence, with their log-probabilities."""
    more = result.accepted.get(sequence_id, Accepted([], []))
    first = result.logprobs.get(sequence_id)
    return Accepted(
        [result.token_ids[sequence_id], *more.token_ids],
        [] if first is None else [first, *more.logprobs],
    )


def _is_decode(row: ScheduledSequence) -> bool:
    """One token, behind at least one that was generated."""
    return row.sampling is not None and len(row.token_ids) == 1 and row.sample_index > 0


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
