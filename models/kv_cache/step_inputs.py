"""Packs a step's sequences into one row of tokens, in numpy.

Owns the arithmetic from block ids to slots, positions and rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import is_
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..attention.base import PagedRows
from ..batch import CrossSegment, ImageToEncode, ScheduledSequence, StepBatch
from .block_table import BlockView

Ints = NDArray[np.int64]


@dataclass(slots=True, frozen=True)
class StepInputs:
    """One step, packed: all tokens of all sequences in one row, in the batch's order.

    token_ids, positions, text_slots: int64 [num_tokens]. text_rows: one causal row a sequence.
    cross_rows: one row a segment, over its images' tiles; None if no token sees an image.
    sees_image: bool [num_tokens]. sampled: int64, the packed positions behind which
    `sampled_sequences` sample: each its last token, and the tokens in front of its drafts.
    """

    token_ids: Ints
    positions: Ints
    text_slots: Ints
    text_rows: PagedRows
    cross_rows: PagedRows | None
    sees_image: NDArray[np.bool_]
    sampled: Ints
    sampled_sequences: list[ScheduledSequence]

    @property
    def sampled_places(self) -> Ints | None:
        """`sampled`, or None if a token is sampled after each packed one, as in most decodes."""
        return None if len(self.sampled) == len(self.token_ids) else self.sampled


def pack(batch: StepBatch, block_size: int, num_patches: int) -> StepInputs:
    """The packed inputs of a batch with at least one sequence.

    block_size: tokens of a text block; num_patches: vision tokens of an image block.
    """
    sequences = batch.sequences
    lens = [len(sequence.token_ids) for sequence in sequences]
    ends = np.cumsum(lens, dtype=np.int64)
    segments = [segment for sequence in sequences for segment in _segments(sequence)]
    sees_image = np.repeat(
        [bool(segment.block_ids) for segment in segments],
        [segment.num_tokens for segment in segments],
    )
    is_sampled = [sequence.sampling is not None for sequence in sequences]
    sampled = [sequence for sequence in sequences if sequence.sampling is not None]
    return StepInputs(
        token_ids=np.concatenate([np.array(s.token_ids, dtype=np.int64) for s in sequences]),
        positions=np.concatenate([_positions(s) for s in sequences]),
        text_slots=np.concatenate([_text_slots(s, block_size) for s in sequences]),
        text_rows=_text_rows(sequences, lens, block_size),
        cross_rows=_cross_rows(segments, num_patches) if sees_image.any() else None,
        sees_image=sees_image,
        sampled=_with_drafts(ends[is_sampled] - 1, sampled),
        sampled_sequences=sampled,
    )


def _with_drafts(lasts: Ints, sequences: list[ScheduledSequence]) -> Ints:
    """The places in front of drafts too. lasts: the last token of each sequence that samples."""
    if not any(one.num_drafts for one in sequences):
        return lasts
    places = [
        np.arange(last - one.num_drafts, last + 1)
        for last, one in zip(lasts, sequences, strict=True)
    ]
    return np.concatenate(places).astype(np.int64)


@dataclass(slots=True, frozen=True)
class PreparedRows:
    """Rows that were packed before their tokens were known."""

    rows: Sequence[ScheduledSequence]
    inputs: StepInputs

    @classmethod
    def of(
        cls, rows: Sequence[ScheduledSequence], block_size: int, num_patches: int
    ) -> PreparedRows:
        """Pack rows whose tokens have any value."""
        return cls(rows, pack(StepBatch(list(rows)), block_size, num_patches))

    def are_all_of(self, batch: StepBatch) -> bool:
        """True if a batch has exactly these rows, in this order."""
        return len(self.rows) == len(batch.sequences) and all(map(is_, self.rows, batch.sequences))

    def with_tokens(self) -> StepInputs:
        """The packed inputs with the rows' current tokens."""
        token_ids = [token_id for row in self.rows for token_id in row.token_ids]
        return replace(self.inputs, token_ids=np.array(token_ids, dtype=np.int64))


def image_slots(images: list[ImageToEncode], num_patches: int) -> Ints:
    """The slots of the images' vision tokens in the image pool, tile after tile."""
    block_ids = np.array([b for image in images for b in image.block_ids], dtype=np.int64)
    return (block_ids[:, None] * num_patches + np.arange(num_patches)).reshape(-1)


def _segments(sequence: ScheduledSequence) -> list[CrossSegment]:
    """The sequence's segments; by default one that sees no image."""
    segments = sequence.segments or [CrossSegment(len(sequence.token_ids), [])]
    covered = sum(segment.num_tokens for segment in segments)
    assert covered == len(sequence.token_ids), "segments must cover the sequence's tokens"
    return segments


def _positions(sequence: ScheduledSequence) -> Ints:
    start = sequence.start
    return np.arange(start, start + len(sequence.token_ids), dtype=np.int64)


def _text_slots(sequence: ScheduledSequence, block_size: int) -> Ints:
    """The slot of each new token, from the blocks of these alone, which must be there."""
    positions = _positions(sequence)
    first = sequence.start // block_size
    blocks = as_array(sequence.block_ids, first).astype(np.int64)
    return blocks[positions // block_size - first] * block_size + positions % block_size


def as_array(block_ids: Sequence[int], start: int = 0) -> NDArray[np.integer[Any]]:
    """The ids from `start` on; those of a view without a copy."""
    if isinstance(block_ids, BlockView):
        return np.frombuffer(block_ids.ids, np.intc, count=len(block_ids))[start:]
    return np.array(block_ids[start:], dtype=np.int64)


def _text_rows(sequences: list[ScheduledSequence], lens: list[int], block_size: int) -> PagedRows:
    return PagedRows(
        query_start_loc=_starts(lens),
        key_lens=np.array([s.start + n for s, n in zip(sequences, lens, strict=True)]),
        block_table=_table([sequence.block_ids for sequence in sequences]),
        block_size=block_size,
        is_causal=True,
    )


def _cross_rows(segments: list[CrossSegment], num_patches: int) -> PagedRows:
    return PagedRows(
        query_start_loc=_starts([segment.num_tokens for segment in segments]),
        key_lens=np.array([len(segment.block_ids) * num_patches for segment in segments]),
        block_table=_table([segment.block_ids for segment in segments]),
        block_size=num_patches,
        is_causal=False,
    )


def _starts(lens: list[int]) -> Ints:
    return np.concatenate([[0], np.cumsum(lens, dtype=np.int64)]).astype(np.int64)


def _table(rows: Sequence[Sequence[int]]) -> Ints:
    """Rows of block ids, padded with 0 to the longest."""
    table = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for row, block_ids in zip(table, rows, strict=True):
        row[: len(block_ids)] = as_array(block_ids)
    return table
