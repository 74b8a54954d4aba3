"""Changes a step's logits before a token is chosen: penalties, biases and bans.

Changes only the logits of tokens in a row's text, biases or bans, so the cost does not grow with
the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..batch import SamplingContext, SamplingParams
from ..device_copies import upload

# A ban is the lowest number, not -inf: a row whose client bans every token still has a best token,
# and does not fail the step for the other rows.
LOWEST = torch.finfo(torch.float32).min
HIGHEST = torch.finfo(torch.float32).max


@dataclass(slots=True, frozen=True)
class _Entry:
    """Some tokens of one row, with one amount for all of them or one for each."""

    row: int
    token_ids: Sequence[int]
    amount: float | Sequence[float]


def adjust(
    logits: Tensor, params: Sequence[SamplingParams], contexts: Sequence[SamplingContext | None]
) -> list[int]:
    """Apply penalties, then biases, then bans to the logits, in place. Returns the changed rows.

    logits: float32 [num_rows, vocab_size], contiguous, finite or -inf; params, contexts: one a row.
    Ids outside the vocabulary (a prompt's `<|image|>` has no logit) are ignored. Finite values stay
    finite. Biases come after the penalties, so that they are not scaled; bans come last, so that
    nothing undoes them.
    """
    rows = [
        row
        for row, (param, context) in enumerate(zip(params, contexts, strict=True))
        if context is not None or param.logit_bias
    ]
    if not rows:
        return rows
    known = [(row, params[row], contexts[row] or SamplingContext()) for row in rows]
    _penalize_repetition(logits, known)
    _penalize_presence_and_frequency(logits, known)
    biased = [
        _Entry(row, [pair[0] for pair in p.logit_bias], [pair[1] for pair in p.logit_bias])
        for row, p, _ in known
    ]
    _change(logits, biased, lambda values, bias: values + bias)
    banned = [_Entry(row, context.banned_token_ids, LOWEST) for row, _, context in known]
    _change(logits, banned, lambda _, lowest: lowest)
    return rows


_Known = list[tuple[int, SamplingParams, SamplingContext]]


def _penalize_repetition(logits: Tensor, known: _Known) -> None:
    """Divide positive and multiply negative logits of tokens in the prompt or the answer.

    Source: CTRL (Keskar et al., 2019), as transformers' RepetitionPenaltyLogitsProcessor.
    """
    seen = [
        _Entry(row, token_ids, p.repetition_penalty)
        for row, p, context in known
        if p.repetition_penalty != 1.0
        for token_ids in (context.prompt_token_ids, context.generated_token_ids)
    ]
    _change(logits, seen, lambda values, r: torch.where(values < 0, values * r, values / r))


def _penalize_presence_and_frequency(logits: Tensor, known: _Known) -> None:
    """Subtract presence_penalty once and frequency_penalty each time that a token was generated.

    Source: OpenAI's API reference, "Frequency and presence penalties".
    """
    present = [
        _Entry(row, context.generated_token_ids, p.presence_penalty)
        for row, p, context in known
        if p.presence_penalty != 0.0
    ]
    _change(logits, present, lambda values, penalty: values - penalty)
    counted = [
        _Entry(row, context.generated_token_ids, -p.frequency_penalty)
        for row, p, context in known
        if p.frequency_penalty != 0.0
    ]
    if found := _places(logits, counted):
        # Equal numbers are added to one place, so their order does not matter.
        logits.view(-1).index_add_(0, found[0], found[1].float())


def _change(
    logits: Tensor, entries: Sequence[_Entry], change: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Replace the entries' logits by change(logits, amounts), both float64.

    A token that a row names twice is changed once: both writes have the same value.
    """
    if found := _places(logits, entries):
        places, amounts = found
        flat = logits.view(-1)
        changed = change(flat[places].double(), amounts)
        # Division by a tiny penalty may exceed the range of float32.
        flat[places] = _finite(changed, flat[places])


def _finite(changed: Tensor, before: Tensor) -> Tensor:
    """The changed values, clamped to float32's range; -inf stays -inf."""
    clamped = changed.clamp(LOWEST, HIGHEST).float()
    return torch.where(before == -torch.inf, before, clamped)


def _places(logits: Tensor, entries: Sequence[_Entry]) -> tuple[Tensor, Tensor] | None:
    """The positions of the entries' tokens in the flat logits, and their amounts (float64)."""
    vocab_size = logits.shape[-1]
    places, amounts = [], []
    for entry in entries:
        token_ids = np.asarray(entry.token_ids, dtype=np.int64)
        is_known = token_ids < vocab_size
        places.append(token_ids[is_known] + entry.row * vocab_size)
        amounts.append(np.broadcast_to(entry.amount, token_ids.shape)[is_known])
    if not any(map(len, places)):
        return None
    amount = np.concatenate(amounts).astype(np.float64)
    device = logits.device
    return upload(np.concatenate(places), device), upload(amount, device)
