"""A pass by transformers' own layers, which may be on several devices.

For models whose layers are not fused; `models/decoder/decoder.py` computes the others.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor

from ..decoder.multi_device import SplitCache, SplitStep
from ..kv_cache.paged_cache import KVPools, PagedCache, PagedStep
from ..kv_cache.step_tensors import Hidden, StepTensors
from ..lora.store import StepAdapters


def compute(
    text_model: Any,
    pools: KVPools,
    own: StepTensors,
    split_step: SplitStep | None,
    vision: Tensor | None,
    adapters: StepAdapters | None,
) -> Hidden:
    """The normalised hidden states of all tokens.

    own: the inputs on the first device. split_step: on all, if several have layers. vision:
    [num_vision_tokens, hidden] of new images.
    """
    row_mask = own.row_mask
    step: PagedStep | SplitStep = split_step or own.step
    cache = PagedCache(pools, own.step) if split_step is None else SplitCache(pools, split_step)
    with nullcontext() if adapters is None else adapters.decoding():
        output = text_model(
            input_ids=own.token_ids[None],
            position_ids=own.positions[None],
            cross_attention_states=None if vision is None else vision[None],
            full_text_row_masked_out_mask=None if row_mask is None else row_mask[None, None],
            past_key_values=cache,
            use_cache=True,
            paged_step=step,
        )
    states: Tensor = output.last_hidden_state[0]
    return Hidden(states, None if own.sampled is None else own.sampled.to(states.device))
