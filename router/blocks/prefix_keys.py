"""Keys of full text blocks. Two blocks have the same key only if they have the same values.

Owns what a key covers: the tenant, the adapter, every token from the prompt's start to the block's
end, and which images each token sees. Nothing else changes a token's keys and values. Knows nothing
of pools, or of what runs.

An adapter that only changes images is covered by the images' own keys: the text before them is
shared with the base model.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left, bisect_right

from ...models.batch import ImageSpan
from .image_pool import ImageKey
from .visibility import is_seen


def scope_of(tenant: str, adapter: str = "") -> str:
    """Sequences share text only within a scope.

    adapter: the digest of an adapter that changes the decoder's layers; empty for all others.
    """
    # Neither part contains a blank.
    return f"{tenant} {adapter}" if adapter else tenant


def extend_block_keys(
    keys: list[bytes],
    token_ids: list[int],
    spans: list[ImageSpan],
    image_keys: list[ImageKey],
    scope: str,
    block_size: int,
) -> None:
    """Append to `keys` the missing keys of the full blocks of `token_ids`.

    spans[i]: the positions that see the image of image_keys[i]. scope: see `scope_of`. Each key is
    a SHA-256 over the key before it, so it covers all tokens up to its block's end.
    """
    parent = keys[-1] if keys else hashlib.sha256(scope.encode()).digest()
    begin = len(keys) * block_size
    edges = sorted({edge for span in spans for edge in (span.start, span.end) if edge is not None})
    view = b""
    for start in range(begin, len(token_ids) - block_size + 1, block_size):
        end = start + block_size
        # Between edges of spans, a block sees the same images as the block before it.
        if start == begin or bisect_right(edges, start - block_size) < bisect_left(edges, end):
            view = _view(spans, image_keys, start, end)
        block = hashlib.sha256(parent)
        block.update(array("q", token_ids[start:end]).tobytes())
        block.update(view)
        parent = block.digest()
        keys.append(parent)


def _view(spans: list[ImageSpan], image_keys: list[ImageKey], start: int, end: int) -> bytes:
    """A hash of which positions of a block see which images; empty if none does.

    Spans are cut to the block, since its values do not depend on where they begin or end outside.
    Positions count from the block's start, which follows from the number of keys before it.
    """
    seen = [
        (max(span.start - start, 0), min(span.end or end, end) - start, tuple(key))
        for span, key in zip(spans, image_keys, strict=True)
        if is_seen(span, start, end)
    ]
    # Tuples of ints, str and bytes: their repr is unambiguous.
    return hashlib.sha256(repr(seen).encode()).digest() if seen else b""
