"""One sequence's part of one step, in the form that the runner takes.

Owns how a sequence's state becomes a row of the batch. Knows nothing of budgets or of order.
"""

from __future__ import annotations

from ...models.batch import ScheduledSequence
from ..blocks.visibility import cut_segments
from .sequence import Sequence

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
