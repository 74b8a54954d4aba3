"""Sampling as a function of its arguments alone: for tests that ask for tokens and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from vlmserve.models.batch import SamplingContext, TokenLogprobs
from vlmserve.models.device_copies import fetch
from vlmserve.models.sampling import sampler
from vlmserve.models.sampling.logprobs import RawLogprobs
from vlmserve.models.sampling.token_counts import TokenCounts


def sample(*args: Any, **kwargs: Any) -> Tensor:
    """The tokens of `sampler.sample`, int64 [num_rows], waited for. Raises what that raises."""
    sampled = sampler.sample(*args, **kwargs)
    while not sampled.is_decided(fetch([sampled.token_ids])[0]):
        pass
    return sampled.token_ids


def context_of(
    prompt: Sequence[int], generated: Sequence[int], banned: Sequence[int] = ()
) -> SamplingContext:
    """The context of a request with these tokens, each of them as often as it comes."""
    counts = TokenCounts()
    for token_id in generated:
        counts.add(token_id)
    return SamplingContext(prompt, counts.token_ids, banned, counts.counts)


def told_of(raw: RawLogprobs, token_ids: Tensor) -> dict[int, TokenLogprobs]:
    """What rows that asked are told of these tokens."""
    return raw.of([tensor.numpy() for tensor in raw.tensors(token_ids)])


NUM_DRAWS = 20_000


def chi_square_is_plausible(counts: np.ndarray, expected: np.ndarray) -> bool:
    """Whether the statistic is below the 99.99 % quantile (Wilson and Hilferty's approximation).

    The draws are a function of fixed seeds, so the answer is the same in every run.
    """
    assert (counts[expected == 0] == 0).all(), "a token outside of the distribution was drawn"
    possible = expected > 0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = max(int(possible.sum()) - 1, 1)
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    return bool(statistic < quantile)
