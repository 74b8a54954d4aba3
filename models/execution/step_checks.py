"""Checks a step's ids before anything is computed.

A CUDA gather out of range would kill the process.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..batch import PoolSizes, ScheduledSequence, StepBatch
from ..errors import StepError
from ..kv_cache.block_table import extremes


def check_ids(batch: StepBatch, num_embeddings: int, sizes: PoolSizes) -> None:
    """Raise StepError for no tokens, or a token or block that model or pools do not have."""
    if not batch.sequences:
        raise StepError(
            "a step has no sequences: images are encoded together with tokens that see them"
        )
    for sequence in batch.sequences:
        _check(sequence.token_ids, num_embeddings, "token id", sequence)
        blocks = extremes(sequence.block_ids)
        _check(blocks, sizes.num_text_blocks, "text block", sequence)
        for segment in sequence.segments:
            _check(segment.block_ids, sizes.num_image_blocks, "image block", sequence)


def _check(ids: Sequence[int], limit: int, what: str, sequence: ScheduledSequence) -> None:
    """Raise StepError unless all ids are in [0, limit)."""
    if ids and (min(ids) < 0 or max(ids) >= limit):
        wrong = next(i for i in ids if not 0 <= i < limit)
        raise StepError(f"request {sequence.request_id}: {what} {wrong} is not in 0 to {limit - 1}")
