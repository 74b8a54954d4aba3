"""Changes a step's logits before a token is chosen: penalties, biases and bans.

Changes only the logits of tokens in a row's text, biases or bans, so the cost does not grow with
the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..batch import SamplingContext, SamplingParams
from ..device_copies import upload
from .token_counts import DistinctIds

# A ban is the lowest number, not -inf: a row whose client bans every token still has a best token,
# and does not fail the step for the other rows.
LOWEST = torch.finfo(torch.float32).min
HIGHEST = torch.finfo(torch.float32).max


@dataclass(slots=True, frozen=True)
class _Entry:
    """Some tokens of one row, with one amount for all of them or one for each."""

    row: int
    token_ids: Sequence[int]
    amount: float | Sequence[float] | NDArray[np.float64]

    @property
    def amounts(self) -> NDArray[np.float64]:
        """One for each token."""
        if isinstance(self.amount, float | int):
            return np.full(len(self.token_ids), self.amount)
        return np.asarray(self.amount, dtype=np.float64)


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
        if context is not None or param.logit_bias or param.allowed_token_ids
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
    for row, param, _ in known:
        if param.allowed_token_ids:
            _allow_only(logits[row], param.allowed_token_ids)
    banned = [_Entry(row, context.banned_token_ids, LOWEST) for row, _, context in known]
    _change(logits, banned, lambda _, lowest: lowest)
    return rows


def _allow_only(row: Tensor, token_ids: Sequence[int]) -> None:
    """Ban all other tokens of a row, in place. row: float32 [vocab_size]."""
    known = [token_id for token_id in token_ids if token_id < len(row)]
    places = upload(known, row.device, np.int64)
    allowed = row[places]
    # A NaN stays one, and what a grammar forbids stays -inf.
    row.clamp_(max=LOWEST)
    row[places] = allowed


_Known = list[tuple[int, SamplingParams, SamplingContext]]


def _penalize_repetition(logits: Tensor, known: _Known) -> None:
    """Divide positive and multiply negative logits of tokens in the prompt or the answer.

    Source: CTRL (Keskar et al., 2019), as transformers' RepetitionPenaltyLogitsProcessor.
    """
    seen = [(row, context) for row, p, context in known if p.repetition_penalty != 1.0]
    if not seen:
        return
    device, vocab_size = logits.device, logits.shape[-1]
    parts = [
        _on_device(context.prompt_token_ids, device, vocab_size) + row * vocab_size
        for row, context in seen
    ]
    generated = [_Entry(row, context.generated_token_ids, 0.0) for row, context in seen]
    if found := _places(logits, generated):
        parts.append(found[0])
    places = torch.cat(parts)
    penalties = np.ones(len(logits))
    for row, p, _ in known:
        penalties[row] = p.repetition_penalty
    amounts = upload(penalties, device)[places.div(vocab_size, rounding_mode="floor")]
    _change_at(logits, places, amounts, lambda v, r: torch.where(v < 0, v * r, v / r))


def _on_device(token_ids: Sequence[int], device: torch.device, vocab_size: int) -> Tensor:
    """The ids that have a logit, int64; those of a prompt are uploaded in its first step only."""
    if not isinstance(token_ids, DistinctIds):
        token_ids = DistinctIds(token_ids)
    if token_ids.kept is None:
        known = np.array(token_ids.ids)
        token_ids.kept = upload(known[known < vocab_size], device)
    return cast(Tensor, token_ids.kept)


def _penalize_presence_and_frequency(logits: Tensor, known: _Known) -> None:
    """Subtract presence_penalty once and frequency_penalty each time that a token was generated.

    Source: OpenAI's API reference, "Frequency and presence penalties".
    """
    generated = [
        _Entry(row, context.generated_token_ids, _penalties(p, context.generated_counts))
        for row, p, context in known
        if p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
    ]
    _change(logits, generated, lambda values, penalty: values - penalty)


def _penalties(params: SamplingParams, counts: Sequence[int]) -> NDArray[np.float64]:
    """What each generated token loses."""
    penalties: NDArray[np.float64] = params.presence_penalty + params.frequency_penalty * np.array(
        counts, dtype=np.float64
    )
    return penalties


def _change(
    logits: Tensor, entries: Sequence[_Entry], change: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Replace the entries' logits by change(logits, amounts), both float64.

    A token that a row names twice is changed once: both writes have the same value.
    """
    if found := _places(logits, entries):
        _change_at(logits, *found, change)


def _change_at(
    logits: Tensor, places: Tensor, amounts: Tensor, change: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """`_change` at these positions of the flat logits."""
    flat = logits.view(-1)
    before = flat[places]
    # Division by a tiny penalty may exceed the range of float32.
    flat[places] = _finite(change(before.double(), amounts), before)


def _finite(changed: Tensor, before: Tensor) -> Tensor:
    """The changed values, clamped to float32's range; -inf stays -inf."""
    clamped = changed.clamp(LOWEST, HIGHEST).float()
    return torch.where(before == -torch.inf, before, clamped)


def _places(logits: Tensor, entries: Sequence[_Entry]) -> tuple[Tensor, Tensor] | None:
    """The positions of the entries' tokens in the flat logits, and their amounts (float64)."""
    entries = [entry for entry in entries if len(entry.token_ids)]
    if not entries:
        return None
    # A copy of each: a sequence's array cannot grow while numpy reads its memory.
    parts = [np.array(entry.token_ids, dtype=np.int64) for entry in entries]
    lens = [len(part) for part in parts]
    token_ids, vocab_size = np.concatenate(parts), logits.shape[-1]
    rows = np.repeat(np.array([entry.row for entry in entries]), lens)
    amounts = np.concatenate([entry.amounts for entry in entries])
    is_known = token_ids < vocab_size
    if not is_known.any():
        return None
    places = (rows * vocab_size + token_ids)[is_known]
    return upload(places, logits.device), upload(amounts[is_known], logits.device)
