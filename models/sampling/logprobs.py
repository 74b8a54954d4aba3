"""Computes log-probabilities of chosen and likeliest tokens, for answers and for prompts.

They are of the raw logits, before penalties, biases, bans and temperature, so they do not depend on
the sampling parameters; vLLM defines them in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..batch import PromptLogprobs, PromptTargets, SamplingParams, TokenLogprobs
from ..device_copies import fetch, upload

# JSON has no -inf.
LOWEST_LOGPROB = -9999.0

# Rows of a prompt at a time: 131 MB of float32 logits for a vocabulary of 128,256.
PROMPT_ROWS = 256


class RawLogprobs:
    """The log-probabilities of the rows that request them, from the unchanged logits."""

    def __init__(self, logits: Tensor, params: Sequence[SamplingParams]) -> None:
        """logits: float32 [num_rows, vocab_size]; params: one a row. Copies rows."""
        counts = ((row, param.num_logprobs) for row, param in enumerate(params))
        self._counts = {row: count for row, count in counts if count is not None}
        if self._counts:
            self._at = upload(list(self._counts), logits.device, np.int64)
            self._logprobs = logits[self._at].log_softmax(dim=-1).clamp_(min=LOWEST_LOGPROB)

    def tensors(self, token_ids: Tensor) -> list[Tensor]:
        """The tensors that `of` needs on the host.

        token_ids: each row's chosen token, int64 [num_rows]; negative ids are ignored.
        """
        if not self._counts:
            return []
        chosen = self._logprobs.gather(-1, token_ids[self._at].clamp_(min=0)[:, None])
        most = min(max(self._counts.values()), self._logprobs.shape[-1])
        top = self._logprobs.topk(most, dim=-1)
        return [chosen.squeeze(1), top.indices, top.values]

    def of(self, arrays: Sequence[NDArray[Any]]) -> dict[int, TokenLogprobs]:
        """row -> the requested log-probabilities. arrays: `tensors`, copied to the host."""
        if not self._counts:
            return {}
        chosen, indices, values = (array.tolist() for array in arrays)
        rows = zip(self._counts.items(), chosen, indices, values, strict=True)
        return {
            row: TokenLogprobs(logprob, ids[:count], top[:count])
            for (row, count), logprob, ids, top in rows
        }


def prompt_logprobs(
    hidden: Tensor, targets: PromptTargets, logits_of: Callable[[Tensor], Tensor]
) -> list[PromptLogprobs | None]:
    """One entry for each target; None for a target without a logit, such as `<|image|>`.

    hidden: [num_targets, hidden_size], of the tokens before the targets. logits_of: hidden rows ->
    float32 [num_rows, vocab_size]; called for PROMPT_ROWS rows at a time.
    """
    entries: list[PromptLogprobs | None] = []
    for begin in range(0, len(targets.token_ids), PROMPT_ROWS):
        end = begin + PROMPT_ROWS
        logits = logits_of(hidden[begin:end])
        entries += _of_rows(logits, targets.token_ids[begin:end], targets.num_top)
    return entries


def _of_rows(logits: Tensor, token_ids: list[int], num_top: int) -> Iterator[PromptLogprobs | None]:
    vocab_size = logits.shape[-1]
    logprobs = logits.log_softmax(dim=-1).clamp_(min=LOWEST_LOGPROB)
    known = [min(token_id, vocab_size - 1) for token_id in token_ids]
    at = upload(known, logits.device, np.int64)
    chosen = logprobs.gather(-1, at[:, None])
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    top = logprobs.topk(min(num_top, vocab_size), dim=-1)
    arrays = fetch([chosen.squeeze(1), ranks, top.indices, top.values])
    rows = zip(token_ids, *(array.tolist() for array in arrays), strict=True)
    for token_id, logprob, rank, ids, values in rows:
        has_logit = token_id < vocab_size
        yield PromptLogprobs(token_id, logprob, rank, ids, values) if has_logit else None
