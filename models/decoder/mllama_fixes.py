"""Fixes transformers' Mllama in the two places where it differs from Meta's implementation.

The fixed model is the tests' oracle, and the bundled model is trained with it.

The differences in transformers 5.17 to 5.23:

1. Cross attention. Meta's implementation multiplies BOTH outputs of a cross-attention layer,
   the attention's and the MLP's, by a row mask that is 0 for each token that sees no image (before
   the first image, or in a text-only request). transformers masks only the MLP (issue 39379): a
   token before the image then attends to the whole image, padding tiles included, and a text-only
   row changes when it shares a batch with an image row.
2. Vision taps. `intermediate_layers_indices` names the INPUT of block i in Meta's implementation
   (and in transformers 4.45 to 4.54). Later releases collect the OUTPUT of block i, so each tap of
   a published checkpoint is one block late.

Both fixes are hooks. They do not change autograd, `generate()` or `state_dict()`, keep no state
between calls, and may be applied twice.
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
    """The model, fixed in place to compute what Meta's implementation computes."""
    return mend_cross_attention(mend_vision(model))


def mend_vision(model: ModelT) -> ModelT:
    """Make each vision tap the input of its block. model: may be only a vision model."""
    for module in list(model.modules()):
        if isinstance(module, MllamaVisionModel) and _mark(module):
            module.transformer.register_forward_hook(_number_taps_by_input, with_kwargs=True)
    return model


def mend_cross_attention(model: ModelT) -> ModelT:
    """Make tokens that see no image pass every cross-attention layer unchanged."""
    for module in list(model.modules()):
        if isinstance(module, MllamaCrossAttentionDecoderLayer) and _mark(module):
            module.register_forward_pre_hook(_hand_row_mask_on, with_kwargs=True)
            module.cross_attn.register_forward_hook(_mask_rows, with_kwargs=True)
    return model


def _mark(module: nn.Module) -> bool:
    """Mark the module; whether it was not marked before."""
    is_new = not getattr(module, _MARK, False)
    setattr(module, _MARK, True)
    return is_new


def _number_taps_by_input(
    encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Replace block outputs by block inputs in the encoder's states.

    States: a tuple of [batch, tokens, hidden], one a block.
    """
    states = output.hidden_states
    block_input = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    # do not shift again in a release that collects inputs
    if states[0] is not block_input:
        output.hidden_states = (block_input, *states[:-1])
    return output


def _hand_row_mask_on(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pass the row mask to the attention; the layer itself does not."""
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
