"""What a soak with drafts asks for besides, and how close each choice of a step was.

Owns no request's check; `soak.py` does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
from msgspec.structs import replace
from support.stepped import MAX_MODEL_LEN
from torch import Tensor

from vlmserve.models.sampling import sampler
from vlmserve.router.messages import AddRequest

GRAMMARS = (
    '{"grammars": [{"json_schema": {"type": "object", "properties": {"first name": {"type": '
    '"string", "maxLength": 4}, "age": {"type": "integer"}}, "required": ["first name", "age"]}}]}',
    '{"grammars": [{"json_schema": {"type": "array", "items": {"enum": ["yes, it is", "no"]}}}]}',
)


def with_more(request: AddRequest, rng: np.random.Generator) -> AddRequest:
    """With what drafts must respect; the prompt's text often comes twice."""
    sampling = replace(
        request.sampling,
        frequency_penalty=float(rng.choice([0.0, 0.0, 0.0, 0.3])),
        min_tokens=int(rng.choice([0, 0, 4])),
        logit_bias=((101, 3.0),) if rng.random() < 0.1 else (),
        num_logprobs=1 if rng.random() < 0.1 else None,
    )
    token_ids = request.prompt_token_ids
    if not request.images and rng.random() < 0.7:
        token_ids = (token_ids * 3)[:30]
    is_formed = rng.random() < 0.2
    return replace(
        request,
        prompt_token_ids=token_ids,
        sampling=sampling,
        max_tokens=min(2 * request.max_tokens, MAX_MODEL_LEN - len(token_ids)),
        stop_token_ids=rng.integers(0, 700, 8).tolist() if rng.random() < 0.3 else [],
        grammar=str(rng.choice(GRAMMARS)) if is_formed else None,
        eos_token_ids=[753] if is_formed else [],
    )


def is_plain(request: AddRequest) -> bool:
    """Whether the likeliest tokens are those of the logits alone."""
    sampling = request.sampling
    is_changed = sampling.has_penalties or sampling.logit_bias or sampling.min_tokens
    return not is_changed and request.grammar is None


@contextlib.contextmanager
def recorded_gaps() -> Iterator[list[float]]:
    """How close each choice of the steps in this block is to another token; one row a step.

    Of a greedy choice the distance of the two best logits, of a draw the distance of the random
    number to the next token's part of the distribution.
    """
    gaps: list[float] = []
    adjust, pick, pick_uncut = sampler.adjust, sampler._pick, sampler._pick_uncut

    def adjusting(logits: Tensor, *more: Any) -> list[int]:
        changed = adjust(logits, *more)
        best, second = logits.topk(2).values[0].tolist()
        gaps.append(best - second)
        return changed

    def picking(weights: Tensor, params: Any, uniforms: list[float]) -> Tensor:
        picked = pick(weights, params, uniforms)  # cumulates the weights in place
        record(weights[0], int(picked[0]), uniforms)
        return picked

    def picking_uncut(weights: Tensor, uniforms: list[float]) -> Tensor:
        picked = pick_uncut(weights, uniforms)
        record(weights[0].double().cumsum(0), int(picked[0]), uniforms)
        return picked

    def record(cumulative: Tensor, place: int, uniforms: list[float]) -> None:
        target = uniforms[0] * float(cumulative[-1])
        low = float(cumulative[place - 1]) if place else 0.0
        gaps[-1] = min(target - low, float(cumulative[place]) - target) / float(cumulative[-1])

    with mock.patch.multiple(sampler, adjust=adjusting, _pick=picking, _pick_uncut=picking_uncut):
        yield gaps
