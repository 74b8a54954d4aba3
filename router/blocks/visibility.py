"""Which image blocks each token of a chunk sees.

Owns the cut of a chunk of positions into runs that see the same images. Knows nothing of budgets
or pools. The spans come from the prompt and follow Meta's rule.
"""

from __future__ import annotations

from itertools import pairwise

from ...models.batch import CrossSegment, ImageSpan


def cut_segments(
    spans: list[ImageSpan], block_ids: list[list[int]], start: int, end: int
) -> list[CrossSegment]:
    """The cross segments of positions start .. end - 1, in order.

    spans[i]: the positions that see image i; block_ids[i]: its blocks. The same picture twice in a
    prompt is two images: its blocks are listed twice and count twice in the attention.
    """
    segments: list[CrossSegment] = []
    for left, right in pairwise(_borders(spans, start, end)):
        visible: list[int] = []
        for span, image_block_ids in zip(spans, block_ids, strict=True):
            if span.covers(left):
                visible += image_block_ids
        segments.append(CrossSegment(right - left, visible))
    return segments


def is_seen(span: ImageSpan, start: int, end: int) -> bool:
    """True if any of the positions start .. end - 1 sees the image of `span`."""
    return span.start < end and (span.end is None or start < span.end)


def _borders(spans: list[ImageSpan], start: int, end: int) -> list[int]:
    """start, end and every position between them where an image's span begins or ends."""
    if end - start == 1:
        return [start, end]
    edges = {start, end}
    for span in spans:
        edges.update(edge for edge in (span.start, span.end) if edge and start < edge < end)
    return sorted(edges)
