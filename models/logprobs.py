"""Tells how likely chosen tokens and their rivals were, by the model's own logits.

Owns log-probabilities for the rows that ask for them. They are of the raw logits, before penalties,
biases, bans and temperature: what the model thinks, the same whatever the sampling parameters, and
as vLLM defines them. Knows nothing of how a token is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .batch import SamplingParams, TokenLogprobs

# JSON has no -inf.
LOWEST_LOGPROB = -9999.0


class RawLogprobs:
    """The log-probabilities of a step's rows that asked; taken before the logits are changed."""

    def __init__(self, logits: Tensor, params: Sequence[SamplingParams]) -> None:
        """logits: float32 [num_rows, vocab_size]; params: one a row. Copies what it needs."""
        counts = ((row, param.num_logprobs) for row, param in enumerate(params))
        self._counts = {row: count for row, count in counts if count is not None}
        if self._counts:
            at = torch.tensor(list(self._counts), device=logits.device)
            self._logprobs = logits[at].log_softmax(dim=-1).clamp_(min=LOWEST_LOGPROB)

    def of(self, token_ids: Tensor) -> dict[int, TokenLogprobs]:
        """row -> what was asked for, given each row's chosen token, int64 [num_rows]."""
        if not self._counts:
            return {}
        at = torch.tensor(list(self._counts), device=token_ids.device)
        chosen = self._logprobs.gather(-1, token_ids[at][:, None]).squeeze(1).tolist()
        most = min(max(self._counts.values()), self._logprobs.shape[-1])
        top = self._logprobs.topk(most, dim=-1)
        tops = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return {
            row: TokenLogprobs(logprob, ids[:count], values[:count])
            for (row, count), logprob, (ids, values) in zip(
                self._counts.items(), chosen, tops, strict=True
            )
        }
