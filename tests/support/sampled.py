"""Sampling as a function of its arguments alone: for tests that ask for tokens and nothing else."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlmserve.models.batch import TokenLogprobs
from vlmserve.models.device_copies import fetch
from vlmserve.models.sampling import sampler as sampling
from vlmserve.models.sampling.logprobs import RawLogprobs


def sample(*args: Any, **kwargs: Any) -> Tensor:
    """The tokens of `sampling.sample`, int64 [num_rows], waited for. Raises what that raises."""
    sampled = sampling.sample(*args, **kwargs)
    while not sampled.is_decided(fetch([sampled.token_ids])[0]):
        pass
    return sampled.token_ids


def told_of(raw: RawLogprobs, token_ids: Tensor) -> dict[int, TokenLogprobs]:
    """What rows that asked are told of these tokens."""
    return raw.of([tensor.numpy() for tensor in raw.tensors(token_ids)])
