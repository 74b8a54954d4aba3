"""Keys of full text blocks: equal only where the keys and values in the block are.

Owns what such a key covers: the tenant, every token from the prompt's start to the
block's end, and which images each of them sees. A token's keys and values depend on
nothing else. Knows nothing of pools, or of what runs.
"""

from __future__ import annotations

import hashlib
from array import array

from ..models.batch import ImageSpan
from .blocks import ImageKey
from .segments import is_seen


def extend_block_keys(
    keys: list[bytes],
    token_ids: list[int],
    spans: list[ImageSpan],
    image_keys: list[ImageKey],
    tenant: str,
    block_size: int,
) -> None:
    """Append the keys of the full blocks of `token_ids` that `keys` does not have yet.

    spans[i] says which positions see the image of image_keys[i]. Each key is a
    SHA-256 over the one before it, so a key stands for all tokens up to its block's end.
    """
    parent = keys[-1] if keys else hashlib.sha256(tenant.encode()).digest()
    for start in range(len(keys) * block_size, len(token_ids) - block_size + 1, block_size):
        end = start + block_size
        block = hashlib.sha256(parent)
        block.update(array("q", token_ids[start:end]).tobytes())
        if spans:
            block.update(_visible(spans, image_keys, start, end))
        parent = block.digest()
        keys.append(parent)


def _visible(spans: list[ImageSpan], image_keys: list[ImageKey], start: int, end: int) -> bytes:
    """Which positions of a block see which images; empty where none sees any.

    Where an image appears or goes beyond the block makes no difference to it.
    """
    seen = [
        (max(span.start, start), min(span.end or end, end), key)
        for span, key in zip(spans, image_keys, strict=True)
        if is_seen(span, start, end)
    ]
    # Tuples of ints, str and bytes: their repr is unambiguous.
    return repr([(first, last, tuple(key)) for first, last, key in seen]).encode() if seen else b""
