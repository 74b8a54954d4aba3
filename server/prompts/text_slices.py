"""Cuts many texts into pieces, so that a hopeless prompt is refused before it is tokenized.

Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

SLICE_CHARS = 65_536


def slices(texts: Iterable[str]) -> Iterator[str]:
    """All texts joined, in slices of at most SLICE_CHARS; none if one slice is enough."""
    waiting: list[str] = []
    num_waiting = 0
    is_long = False
    for text in texts:
        for begin in range(0, len(text), SLICE_CHARS):
            piece = text[begin : begin + SLICE_CHARS]
            if num_waiting + len(piece) > SLICE_CHARS:
                yield "".join(waiting)
                waiting, num_waiting, is_long = [], 0, True
            waiting.append(piece)
            num_waiting += len(piece)
    if is_long:
        yield "".join(waiting)
