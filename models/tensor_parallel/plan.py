"""How a Mllama is cut for tensor parallelism; cuts a module before its weights are loaded.

transformers has no plan for this architecture, so this is the project's own:

    text      q, k, v, gate, up     OUT   a rank has some heads, KV heads and channels
              o, down               IN    products are summed over the ranks
    vision    q, k, v, fc1          OUT
              o, fc2                IN    fc2's bias is added once, after the sum
    head      lm_head               OUT   logits are joined, if the vocabulary divides
    all else  whole on every rank: embeddings, norms, gates, the projector

A vision encoder whose heads do not divide stays whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import cast

from torch import nn
from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaTextConfig
from transformers.models.mllama.configuration_mllama import MllamaVisionConfig
from transformers.models.mllama.modeling_mllama import (
    MllamaTextCrossAttention,
    MllamaTextMLP,
    MllamaTextSelfAttention,
    MllamaVisionAttention,
    MllamaVisionMLP,
)

from ..errors import ModelError

HEAD = "lm_head"
TEXT_ATTENTION = (MllamaTextSelfAttention, MllamaTextCrossAttention)


class Side(IntEnum):
    """The side along which a weight [out, in] is cut; the value is the tensor's dimension."""

    OUT = 0
    IN = 1


_SIDES: dict[type[nn.Module], dict[str, Side]] = {
    **{
        attention: {
            "q_proj": Side.OUT,
            "k_proj": Side.OUT,
            "v_proj": Side.OUT,
            "o_proj": Side.IN,
        }
        for attention in (*TEXT_ATTENTION, MllamaVisionAttention)
    },
    MllamaTextMLP: {"gate_proj": Side.OUT, "up_proj": Side.OUT, "down_proj": Side.IN},
    MllamaVisionMLP: {"fc1": Side.OUT, "fc2": Side.IN},
}
_VISION = (MllamaVisionAttention, MllamaVisionMLP)


def check_size(config: MllamaConfig, size: int) -> None:
    """Raise ModelError, with the possible sizes, unless the text model divides by `size`."""
    text = cast(MllamaTextConfig, config.text_config)
    counts = {
        "attention heads": text.num_attention_heads,
        "KV heads": text.num_key_value_heads,
        "MLP channels": text.intermediate_size,
    }
    for what, count in counts.items():
        if count % size:
            fitting = [n for n in range(1, count + 1) if not any(c % n for c in counts.values())]
            raise ModelError(
                f"the model's {count} {what} do not divide by {size} ranks: "
                f"--tensor-parallel-size can be {', '.join(map(str, fitting))}"
            )


def cut_linears(model: MllamaForConditionalGeneration, size: int) -> dict[str, Side]:
    """The names of the linear layers that `size` ranks share, and the side each is cut along."""
    vision = cast(MllamaVisionConfig, model.config.vision_config)
    cuts_vision = not (vision.attention_heads % size or vision.intermediate_size % size)
    found: dict[str, Side] = {}
    for name, module in model.named_modules():
        if isinstance(module, _VISION) and not cuts_vision:
            continue
        sides = _SIDES.get(type(module), {})
        found |= {f"{name}.{child}": side for child, side in sides.items()}
    head = cast(nn.Linear, model.get_submodule(HEAD))
    if head.out_features % size == 0:
        found[HEAD] = Side.OUT
    return found


def narrow(model: MllamaForConditionalGeneration, linears: Mapping[str, Side], size: int) -> None:
    """Turn a whole module on the meta device into a rank's module, in place.

    Names do not change, so a rank's share of a weight has the whole weight's name.
    """
    for name, side in linears.items():
        parent, child = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        setattr(parent, child, _narrowed(model.get_submodule(name), side, size))
    for name, module in model.named_modules():
        if f"{name}.q_proj" in linears:
            module.num_heads //= size
            if isinstance(module, TEXT_ATTENTION):
                module.num_key_value_heads //= size


def _narrowed(linear: nn.Module, side: Side, size: int) -> nn.Linear:
    assert isinstance(linear, nn.Linear), "only linear layers are cut"
    assert linear.weight.device.type == "meta", "the module must not have weights yet"
    num_in, num_out = linear.in_features, linear.out_features
    return nn.Linear(
        num_in // size if side is Side.IN else num_in,
        num_out // size if side is Side.OUT else num_out,
        bias=linear.bias is not None,
        device="meta",
        dtype=linear.weight.dtype,
    )


def rank_slice(length: int, rank: int, size: int) -> slice:
    """The rank's part of a side of `length`."""
    assert length % size == 0, "the side must divide by the ranks"
    part = length // size
    return slice(rank * part, (rank + 1) * part)
