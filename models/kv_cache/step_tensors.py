"""A step's inputs on the device, by one copy, and its hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..attention import AttentionBackend
from ..device_copies import upload_together
from .paged_cache import PagedStep
from .step_inputs import StepInputs


@dataclass(slots=True, frozen=True)
class StepTensors:
    """What the model reads in one step.

    token_ids, positions: int64 [num_tokens]. row_mask: [num_tokens, 1] in the model's dtype, 1 for
    a token that sees an image, else 0; None if all tokens do. sampled: int64, see `Hidden`.
    """

    token_ids: Tensor
    positions: Tensor
    row_mask: Tensor | None
    sampled: Tensor | None
    step: PagedStep


@dataclass(slots=True, frozen=True)
class Hidden:
    """The normalised hidden states of a step, [num_tokens, hidden].

    sampled: the places of the tokens after which one is sampled; None if these are all tokens.
    """

    states: Tensor
    sampled: Tensor | None

    def of_sampled(self) -> Tensor:
        """The states of the tokens after which one is sampled, [num_sampled, hidden]."""
        return self.states if self.sampled is None else self.states.index_select(0, self.sampled)


def send(
    inputs: StepInputs,
    image_slots: NDArray[np.int64] | None,
    backend: AttentionBackend,
    device: torch.device,
    dtype: torch.dtype,
) -> StepTensors:
    """Copy a step's inputs to a device: its ids and masks, and the lists of its attention.

    image_slots: of the images that the step encodes. One copy with a backend that has `lists`.
    """
    plans = [backend.lists(inputs.text_rows, device, dtype)]
    if inputs.cross_rows is not None:
        plans.append(backend.lists(inputs.cross_rows, device, dtype))
    is_every_token_seeing = bool(inputs.sees_image.all())
    optional: list[NDArray[Any] | None] = [
        None if is_every_token_seeing else inputs.sees_image,
        inputs.sampled_places,
        image_slots,
    ]
    arrays: list[NDArray[Any]] = [inputs.token_ids, inputs.positions, inputs.text_slots]
    arrays += [array for array in optional if array is not None]
    arrays += [array for plan in plans for array in plan.arrays]
    copies = iter(upload_together(arrays, device))
    token_ids, positions, slots = (next(copies) for _ in range(3))
    mask, sampled, images = (None if one is None else next(copies) for one in optional)
    text, *cross = (plan.plan([next(copies) for _ in plan.arrays]) for plan in plans)
    return StepTensors(
        token_ids=token_ids,
        positions=positions,
        row_mask=None if mask is None else mask.to(dtype)[:, None],
        sampled=sampled,
        step=PagedStep(backend, slots, images, text, cross[0] if cross else None),
    )
