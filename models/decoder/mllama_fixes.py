"""transformers' Mllama, mended in the two places where it departs from Meta's implementation.

The tests' oracle, and what the bundled model is trained under. Knows nothing of the server.

transformers 5.17 to 5.23 errs twice:

1. Cross attention. Meta's implementation multiplies BOTH outputs of a cross-attention layer,
   the attention's and the MLP's, by a row mask which is 0 for each token that may see no image
   (a token before the first image; every token of a text-only request). transformers masks only
   the MLP (issue 39379): a token before the image then attends to the whole image, padding tiles
   included, and a text-only row changes when it shares a batch with an image row.
2. Vision taps. `intermediate_layers_indices` names the INPUT of block i in Meta's implementation
   (and in transformers 4.45 to 4.54); later releases collect the OUTPUT of block i, so that each
   tap of a published checkpoint comes one block too late.

Both mends are hooks: they keep autograd, `generate()` and `state_dict()` as they are, hold no state
between calls, and are safe to apply twice.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn
from transformers.models.mllama.modeling_mllama import (
    MllamaCrossAttentionDecoderLayer,
    MllamaVisionModel,
)

ModelT = TypeVar("ModelT", bound=nn.Module)

_MARK = "_vlmserve_mended"
_ROW_MASK = "cross_attention_row_mask"


def mend(model: ModelT) -> ModelT:
    """The same model, computing what Meta's implementation computes; mended in place."""
    return mend_cross_attention(mend_vision(model))


def mend_vision(model: ModelT) -> ModelT:
    """Let each vision tap be the input of its block; `model` may be a vision model alone."""
    for module in list(model.modules()):
        if isinstance(module, MllamaVisionModel) and _mark(module):
            module.transformer.register_forward_hook(_number_taps_by_input, with_kwargs=True)
    return model


def mend_cross_attention(model: ModelT) -> ModelT:
    """Let a token that may see no image pass every cross-attention layer unchanged."""
    for module in list(model.modules()):
        if isinstance(module, MllamaCrossAttentionDecoderLayer) and _mark(module):
            module.register_forward_pre_hook(_hand_row_mask_on, with_kwargs=True)
            module.cross_attn.register_forward_hook(_mask_rows, with_kwargs=True)
    return model


def _mark(module: nn.Module) -> bool:
    """Whether the module was unmended until now."""
    is_new = not getattr(module, _MARK, False)
    setattr(module, _MARK, True)
    return is_new


def _number_taps_by_input(
    encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Shift the encoder's states, block outputs as they come, to block inputs.

    States: a tuple of [batch, tokens, hidden], one a block.
    """
    states = output.hidden_states
    block_input = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    # a release that numbers the states by input again must not be shifted a second time
    if states[0] is not block_input:
        output.hidden_states = (block_input, *states[:-1])
    return output


def _hand_row_mask_on(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pass the row mask to the attention, which the layer itself keeps from it."""
    return args, kwargs | {_ROW_MASK: kwargs.get("full_text_row_masked_out_mask")}


def _mask_rows(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Zero the attention output, [batch, tokens, hidden], where the row mask is 0.

    Row mask: [batch, 1, tokens, 1].
    """
    row_mask: Tensor | None = kwargs.get(_ROW_MASK)
    if row_mask is None:
        return output
    return (row_mask[:, 0] * output[0], *output[1:])
