"""Tells how likely chosen tokens and their rivals were, by the model's own logits.

Owns log-probabilities for the rows that ask for them, and for prompts. They are of the raw logits,
before penalties, biases, bans and temperature: what the model thinks, the same whatever the
sampling parameters, and as vLLM defines them. Knows nothing of how a token is chosen.
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
    """The log-probabilities of a step's rows that asked; taken before the logits are changed."""

    def __init__(self, logits: Tensor, params: Sequence[SamplingParams]) -> None:
        """logits: float32 [num_rows, vocab_size]; params: one a row. Copies what it needs."""
        counts = ((row, param.num_logprobs) for row, param in enumerate(params))
        self._counts = {row: count for row, count in counts if count is not None}
        if self._counts:
            self._at = upload(list(self._counts), logits.device, np.int64)
            self._logprobs = logits[self._at].log_softmax(dim=-1).clamp_(min=LOWEST_LOGPROB)

    def tensors(self, token_ids: Tensor) -> list[Tensor]:
        """What `of` needs on the host, given each row's chosen token, int64 [num_rows].

        Ids that are none are passed over.
        """
        if not self._counts:
            return []
        chosen = self._logprobs.gather(-1, token_ids[self._at].clamp_(min=0)[:, None])
        most = min(max(self._counts.values()), self._logprobs.shape[-1])
        top = self._logprobs.topk(most, dim=-1)
        return [chosen.squeeze(1), top.indices, top.values]

    def of(self, told: Sequence[NDArray[Any]]) -> dict[int, TokenLogprobs]:
        """row -> what was asked for, given a copy of `tensors`."""
        if not self._counts:
            return {}
        chosen, indices, values = (array.tolist() for array in told)
        rows = zip(self._counts.items(), chosen, indices, values, strict=True)
        return {
            row: TokenLogprobs(logprob, ids[:count], top[:count])
            for (row, count), logprob, ids, top in rows
        }


def prompt_logprobs(
    hidden: Tensor, targets: PromptTargets, logits_of: Callable[[Tensor], Tensor]
) -> list[PromptLogprobs | None]:
    """One entry a target; None where the target has no logit, as `<|image|>`.

    hidden: [num_targets, hidden_size], of the tokens before the targets; logits_of:
    hidden rows -> float32 [num_rows, vocab_size], asked for PROMPT_ROWS rows at a time.
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
    known = [min(one, vocab_size - 1) for one in token_ids]
    at = upload(known, logits.device, np.int64)
    chosen = logprobs.gather(-1, at[:, None])
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    top = logprobs.topk(min(num_top, vocab_size), dim=-1)
    told = fetch([chosen.squeeze(1), ranks, top.indices, top.values])
    rows = zip(token_ids, *(array.tolist() for array in told), strict=True)
    for token_id, logprob, rank, ids, values in rows:
        has_logit = token_id < vocab_size
        yield PromptLogprobs(token_id, logprob, rank, ids, values) if has_logit else None
