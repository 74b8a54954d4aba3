"""Chooses each row's next token from its logits, all rows of a step at once.

Owns temperature, top-k, top-p, min-p and the requests' random streams. The order is that of
transformers:

    repetition, presence, frequency penalty -> logit_bias ->              penalties.py; greedy too
        allowed_token_ids -> min_tokens, banned_sequences
    temperature -> top_k -> top_p -> min_p                                only for sampled rows

Each filter sees what the one before it kept: top_p is a share of top_k's tokens. min_p compares
with the best token, which both keep.

A row costs only what it uses: a step of greedy rows without other options is one argmax. Weights
over a whole vocabulary are float32, unless min_p cuts them: float64 is slow on most GPUs. Only sums
of them, a window of the best, and the part in which a draw ends are float64.

Nothing here waits for the device. Rows that are not finite, and cuts outside a window, are reported
by negative token ids, which arrive with the tokens' copy.

A request's random stream is counter-based: the uniform number for its n-th token is a hash of
(seed, n). So a draw depends only on the request's logits, seed and position, not on other requests
or preemptions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from ..batch import SamplingContext, SamplingParams
from ..device_copies import upload
from ..errors import NonFiniteLogitsError
from .penalties import adjust

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
# 52 bits, not 53: (1 - 2**-53) times a total just over 1 would round to the total
_BITS = 52
# instead of a token id: the row's logits are not finite; the whole row must be sorted
NOT_FINITE, UNDECIDED = -1, -2
# best tokens of a row that top-k and top-p sort before they sort the whole vocabulary
WINDOW = 1024
_LOWEST_TEMPERATURE = 1e-30
# a draw without a cut sums the weights of so many tokens, then looks at each in one such part
PART = 256
# at a time: sorting takes many times a row's memory
_ROWS_SORTED_WHOLE = 8


@dataclass(slots=True, frozen=True)
class Masks:
    """The allowed tokens of some rows as bits: uint8 [len(rows), ceil(vocab_size / 8)].

    From `grammar.Grammars.fill`, lowest bit of a byte first.
    """

    rows: Sequence[int]
    allowed: NDArray[np.uint8]

    def apply(self, logits: Tensor) -> None:
        """Set the logits of forbidden tokens to -inf, in place."""
        device = logits.device
        allowed = upload(self.allowed, device)
        # Eight tokens a look-up: on a CPU, a fourth of the time of a bool mask.
        lowered = _penalties_of_bytes(device)[allowed.int()]
        logits.index_add_(
            0, _places(self.rows, device), lowered.view(len(self.rows), -1)[:, : logits.shape[-1]]
        )


@functools.cache
def _penalties_of_bytes(device: torch.device) -> Tensor:
    """For each byte of a mask: 0 for a set bit, else -inf; float32 [256, 8]."""
    is_set = (np.arange(256)[:, None] >> np.arange(8)) & 1
    return upload(np.where(is_set, 0.0, -np.inf), device, np.float32)


def _places(rows: Sequence[int], device: torch.device) -> Tensor:
    """Rows as an index tensor."""
    return upload(rows, device, np.int64)


def uniform(seed: int, sample_index: int) -> float:
    """The random number in [0, 1) for a request's sample_index-th token (from 0).

    splitmix64 (Steele et al., 2014). The seed is mixed first, so that the streams of neighbouring
    seeds are not shifts of each other.
    """
    state = (_mix(seed & _MASK) + (sample_index + 1) * _GOLDEN) & _MASK
    return (_mix(state) >> (64 - _BITS)) * 2.0**-_BITS


def _mix(value: int) -> int:
    """The finalizer of splitmix64, on 64 bits."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class Sampled:
    """A step's tokens while the device computes them.

    token_ids: int64 [num_rows] on the device. Pass a copy to `is_decided`; if it returns False, it
    has drawn some tokens again, so copy again.
    """

    def __init__(
        self,
        token_ids: Tensor,
        logits: Tensor,
        best: Tensor,
        params: Sequence[SamplingParams],
        sample_indices: Sequence[int],
    ) -> None:
        self.token_ids = token_ids
        self._logits, self._best = logits, best
        self._params, self._indices = params, sample_indices

    def is_decided(self, token_ids: NDArray[np.int64]) -> bool:
        """Whether a copy of `token_ids` has the step's final tokens; else draws the others again.

        Raises NonFiniteLogitsError, with the rows, if logits have NaN or +inf or ban all tokens.
        """
        if (token_ids >= 0).all():
            return True
        if len(damaged := np.flatnonzero(token_ids == NOT_FINITE)):
            raise NonFiniteLogitsError(
                f"logits of rows {damaged.tolist()} of {len(token_ids)} are not finite: the "
                "weights are damaged or the dtype is too narrow for them; try --dtype bfloat16 or "
                "float32"
            )
        late = np.flatnonzero(token_ids == UNDECIDED).tolist()
        for begin in range(0, len(late), _ROWS_SORTED_WHOLE):
            self.draw(late[begin : begin + _ROWS_SORTED_WHOLE], is_whole=True)
        return not late

    def draw(self, rows: Sequence[int], is_whole: bool = False) -> None:
        """Draw the tokens of sampled rows. is_whole: sort whole rows."""
        at = _places(rows, self.token_ids.device)
        params = [self._params[row] for row in rows]
        uniforms = [uniform(self._params[row].seed, self._indices[row]) for row in rows]
        is_every_row = len(rows) == len(self._logits)
        logits = self._logits if is_every_row else self._logits[at]
        self.token_ids[at] = _draw(logits, self._best[at], params, uniforms, is_whole)


def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    sample_indices: Sequence[int],
    contexts: Sequence[SamplingContext | None] | None = None,
    masks: Masks | None = None,
) -> Sampled:
    """A token for each row; the device computes them while the caller continues.

    logits: float32 [num_rows, vocab_size], contiguous; -inf bans a token. params, sample_indices
    and contexts (if any row has a context): one a row. masks: the tokens that grammars allow in
    some rows; they apply first and cannot be undone. Rows with masks, penalties, biases or bans
    are changed in place.
    """
    if masks is not None:
        masks.apply(logits)
    best, token_ids = logits.max(dim=-1)
    # max() propagates NaN and +inf, so the best logit shows whether the row is finite; the
    # difference is NaN if not. isfinite() is four kernels.
    is_damaged = (best - best).ne(0.0)
    if changed := adjust(logits, params, contexts or [None] * len(params)):
        at = _places(changed, logits.device)
        is_every_row = len(changed) == len(logits)
        best[at], token_ids[at] = (logits if is_every_row else logits[at]).max(dim=-1)
    sampled = Sampled(token_ids, logits, best, params, sample_indices)
    if rows := [row for row, param in enumerate(params) if not param.is_greedy]:
        sampled.draw(rows)
    token_ids.masked_fill_(is_damaged, NOT_FINITE)
    return sampled


def _draw(
    logits: Tensor,
    best: Tensor,
    params: Sequence[SamplingParams],
    uniforms: list[float],
    is_whole: bool,
) -> Tensor:
    """A draw for each row from its filtered distribution; no row is greedy.

    UNDECIDED for a row that must be sorted whole; `is_whole` sorts all rows whole.
    """
    groups: dict[_Cut, list[int]] = {}
    for row, param in enumerate(params):
        groups.setdefault(_Cut.of(param), []).append(row)
    if len(groups) == 1:
        (cut,) = groups
        return _draw_alike(logits, best, params, uniforms, cut, is_whole)
    drawn = torch.empty(len(params), dtype=torch.int64, device=logits.device)
    for cut, rows in groups.items():
        at = _places(rows, logits.device)
        drawn[at] = _draw_alike(
            logits[at], best[at], [params[row] for row in rows], [uniforms[row] for row in rows],
            cut, is_whole,
        )  # fmt: skip
    return drawn


class _Cut(Enum):
    """What removes tokens of a row: nothing, min-p alone, or top-k or top-p (and min-p)."""

    NONE, MIN_P, BEST = range(3)

    @classmethod
    def of(cls, params: SamplingParams) -> _Cut:
        if params.top_k > 0 or params.top_p < 1.0:
            return cls.BEST
        return cls.MIN_P if params.min_p > 0.0 else cls.NONE


def _draw_alike(
    logits: Tensor,
    best: Tensor,
    params: Sequence[SamplingParams],
    uniforms: list[float],
    cut: _Cut,
    is_whole: bool,
) -> Tensor:
    """`_draw` for rows that are all cut alike."""
    if cut is _Cut.NONE:
        return _pick_uncut(_float32_weights(logits, best, params), uniforms)
    if cut is _Cut.MIN_P:
        return _pick(_weights(logits, best, params), params, uniforms)
    if is_whole or logits.shape[-1] <= WINDOW:
        window = _ordered(logits, None)
    else:
        window = _ordered(logits, logits.topk(WINDOW, dim=-1).indices.sort(dim=-1).values)
    kept, is_undecided = _cut(logits, best, window, params)
    # a draw goes through the tokens by id, as without a cut
    by_id = window.token_ids.sort(dim=-1)
    picked = _pick(kept.gather(-1, by_id.indices), params, uniforms)
    drawn = by_id.values.gather(-1, picked[:, None]).squeeze(1)
    return drawn if is_undecided is None else drawn.masked_fill(is_undecided, UNDECIDED)


def _weights(logits: Tensor, best: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The probabilities of a row's tokens over that of the best, float64 in the logits' shape."""
    temperature = upload([p.temperature for p in params], logits.device, np.float64)
    # relative to the best logit, so that a tiny temperature gives 0 and 1, not inf - inf
    weights = logits.to(torch.float64, copy=True).sub_(best.double()[:, None])
    return weights.div_(temperature[:, None]).exp_()


def _pick(weights: Tensor, params: Sequence[SamplingParams], uniforms: list[float]) -> Tensor:
    """The place of each row's token after min-p, int64 [num_rows]. Changes `weights`."""
    device = weights.device
    if any(p.min_p > 0.0 for p in params):
        # the best token's weight is 1
        min_p = upload([p.min_p for p in params], device, np.float64)
        weights.masked_fill_(weights < min_p[:, None], 0.0)
    cumulative = weights.cumsum_(dim=-1)
    target = upload(uniforms, device, np.float64) * cumulative[:, -1]
    # the first token whose cumulative weight passes the target; its weight is never 0
    picked = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(1)
    return picked.clamp_(max=weights.shape[-1] - 1)  # NaN, whose row is reported, passes none


def _pick_uncut(weights: Tensor, uniforms: list[float]) -> Tensor:
    """`_pick` of rows without min-p, by float32 weights.

    A random number within 1e-6 of the end of a token's share may fall on the other side of it than
    by float64 weights.
    """
    device, (num_rows, vocab_size) = weights.device, weights.shape
    if vocab_size % PART:
        weights = pad(weights, (0, -vocab_size % PART))
    parts = weights.view(num_rows, -1, PART)
    # sixteen at a time in float32: rounded by less than 1e-6 of a share
    sums = parts.view(num_rows, -1, PART // 16, 16).sum(dim=-1)
    ends = pad(sums.sum(dim=-1, dtype=torch.float64).cumsum_(dim=-1), (1, 0))
    target = (upload(uniforms, device, np.float64) * ends[:, -1])[:, None]
    # the first part whose end passes the target; its sum is never 0
    part = torch.searchsorted(ends[:, 1:].contiguous(), target, right=True)
    part.clamp_(max=parts.shape[1] - 1)
    chosen = parts.gather(1, part[:, :, None].expand(-1, -1, PART)).squeeze(1)
    cumulative = chosen.double().cumsum_(dim=-1)
    total = cumulative[:, -1:]
    # the part's sum may be rounded otherwise than `total`
    rest = torch.minimum(target - ends.gather(-1, part), total.nextafter(total.new_zeros(())))
    place = torch.searchsorted(cumulative, rest, right=True)
    return (part * PART + place).squeeze(1).clamp_(max=vocab_size - 1)  # as in `_pick`


@dataclass(slots=True, frozen=True)
class _Window:
    """The best tokens of each row, best first: logits and ids [num_rows, count]."""

    logits: Tensor
    token_ids: Tensor


def _ordered(logits: Tensor, token_ids: Tensor | None) -> _Window:
    """The tokens of these ids (ascending in each row; None: all); of equals the lower id first."""
    if token_ids is None:
        ordered = logits.sort(dim=-1, descending=True, stable=True)
        return _Window(ordered.values, ordered.indices)
    ordered = logits.gather(-1, token_ids).sort(dim=-1, descending=True, stable=True)
    return _Window(ordered.values, token_ids.gather(-1, ordered.indices))


def _cut(
    logits: Tensor, best: Tensor, window: _Window, params: Sequence[SamplingParams]
) -> tuple[Tensor, Tensor | None]:
    """The window's weights after top-k and then top-p, 0 for removed tokens.

    Both keep the best token. top_p keeps the fewest best tokens whose share of top_k's tokens
    reaches top_p. Weights are float64; only the sum over a whole vocabulary is of weights in
    float32, so a share within 1e-6 of top_p may count as below or above it.

    Also which rows are undecided, bool [num_rows]: their cut may be outside the window, and sorting
    them whole gives the exact result (sorting 128,256 tokens takes over ten milliseconds a row).
    None if the window is the whole row.
    """
    device, count, vocab_size = logits.device, window.logits.shape[-1], logits.shape[-1]
    weights = _weights(window.logits, best, params)
    limits = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
    top_k = upload(limits, device, np.int64)
    weights.masked_fill_(torch.arange(count, device=device) >= top_k[:, None], 0.0)
    top_p = upload([p.top_p for p in params], device, np.float64)
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1]
    if any(p.top_p < 1.0 and limit == vocab_size for p, limit in zip(params, limits, strict=True)):
        total = torch.where(top_k < vocab_size, total, _sum(logits, best, params))
    is_over = (cumulative - weights >= (top_p * total)[:, None]) & (top_p < 1)[:, None]
    is_over[:, 0] = False
    kept = weights.masked_fill_(is_over, 0.0)
    if count == vocab_size:
        return kept, None
    least = window.logits.masked_fill(kept == 0.0, float("inf")).amin(dim=-1)
    # tokens equal to the window's last may continue outside it, with lower ids
    is_decided = least > window.logits[:, -1]
    # if top_k exceeds the window, the sum of its tokens is unknown
    return kept, ~(is_decided & ((top_k <= count) | (top_k == vocab_size)))


def _sum(logits: Tensor, best: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The sum of each row's weights, each computed in float32."""
    return _float32_weights(logits, best, params).sum(dim=-1, dtype=torch.float64)


def _float32_weights(logits: Tensor, best: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """`_weights` in float32."""
    # 0 in float32 would divide the best token's 0 by 0
    lowest = [max(p.temperature, _LOWEST_TEMPERATURE) for p in params]
    temperature = upload(lowest, logits.device, np.float32)
    return (logits - best[:, None]).div_(temperature[:, None]).exp_()
