"""Random changes to bytes: what makes a sample of a fuzzer's work where no fuzzer is installed.

Knows nothing of what the bytes mean but the words that it is given.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

MAX_BYTES = 2_000


def mutated(seeds: Sequence[bytes], words: Sequence[bytes], rng: random.Random) -> bytes:
    """A seed, or the beginning of one and the end of another, changed in a few places."""
    data = bytearray(rng.choice(seeds))
    if rng.random() < 0.2:
        other = rng.choice(seeds)
        data = data[: rng.randint(0, len(data))] + other[rng.randint(0, len(other)) :]
    for _ in range(rng.randint(1, 6)):
        begin = rng.randint(0, len(data))
        end = min(len(data), begin + rng.choice((0, 0, 1, 1, 4, 20)))
        data[begin:end] = _insert(bytes(data[begin:end]), words, rng)
    return bytes(data[:MAX_BYTES])


def _insert(cut: bytes, words: Sequence[bytes], rng: random.Random) -> bytes:
    """What takes the place of a piece: a word, random bytes, the piece twice, or nothing."""
    kind = rng.randrange(4)
    if kind == 0 and words:
        return rng.choice(words)
    if kind == 1:
        return bytes(rng.randrange(256) for _ in range(rng.randint(1, 3)))
    return cut * 2 if kind == 2 else b""
