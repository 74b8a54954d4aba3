"""What one sequence runs in one step, laid out for the runner.

Owns how a sequence's state becomes a row of the batch. Knows nothing of budgets or of who runs.
"""

from __future__ import annotations

from ...models.batch import ScheduledSequence
from ..blocks.visibility import cut_segments
from .sequence import Sequence

# stands for a token that is still being sampled
_UNKNOWN = 0


def row_of(sequence: Sequence, start: int, end: int, num_blocks: int) -> ScheduledSequence:
    """The row of positions start .. end - 1, which lie in the sequence's first `num_blocks` blocks.

    All but what depends on its tokens: `fill` adds that. So it may be of the one position
    behind the known tokens too.
    """
    is_sampled, num_tokens = end >= sequence.num_tokens, max(end, sequence.num_tokens)
    return ScheduledSequence(
        request_id=sequence.sequence_id,
        token_ids=[_UNKNOWN] * (end - start),
        start=start,
        block_ids=sequence.block_ids[:num_blocks],
        segments=cut_segments(
            sequence.request.spans, [entry.block_ids for entry in sequence.images], start, end
        ),
        sampling=sequence.sampling if is_sampled else None,
        sample_index=num_tokens - len(sequence.request.prompt_token_ids),
        matcher=sequence.matcher if is_sampled else None,
        prompt=sequence.prompt_targets(start, end),
    )


def fill(row: ScheduledSequence, sequence: Sequence) -> None:
    """Add the tokens, which are known now, and what sampling must know of them."""
    row.token_ids = sequence.token_ids[row.start : row.start + len(row.token_ids)]
    if row.sampling is not None:
        row.context = sequence.sampling_context()
