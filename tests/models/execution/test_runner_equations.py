"""The runner against the text model written out from Meta's equations, at every position.

float32 on a CPU, within 2e-5, on random checkpoints with all gates at 0.7. Shares only the weights
and the vision model with transformers.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.oracle import (
    TINY_LAYOUTS,
    Request,
    oracle,
    pixel_values,
    prefill_logits,
    requests,
    runner,
)
from torch import Tensor

TOLERANCE = 2e-5


def norm(states: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + eps)


def rotate(states: Tensor, inv_freq: Tensor) -> Tensor:
    """RoPE of [tokens, heads, head_dim] at positions 0, 1, ..., halves paired."""
    angles = torch.arange(len(states))[:, None] * inv_freq
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    left, right = states.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def heads_attend(query: Tensor, keys: Tensor, values: Tensor, is_seen: Tensor) -> Tensor:
    """Softmax attention a head at a time; a token that sees nothing gets zeros."""
    group, output = query.shape[1] // keys.shape[1], torch.zeros_like(query)
    for head in range(query.shape[1]):
        scores = query[:, head] @ keys[:, head // group].T / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(~is_seen, float("-inf")).softmax(-1)
        output[:, head] = weights.nan_to_num() @ values[:, head // group]
    return output.flatten(1)


@torch.inference_mode()
def equations(layout: str, request: Request) -> Tensor:
    """Logits at every position, from Meta's equations and the checkpoint's weights alone.

    x = x + tanh(g1) m (W_o attention(norm(x)));  x = x + tanh(g2) m mlp(norm(x))
    with m = 0 for a token that sees no image; self-attention layers with tanh(g) m = 1.
    Vision states: transformers' vision model on each image alone, real tiles only.
    """
    model = oracle(layout)
    text = model.model.language_model
    num_kv_heads, head_dim = text.config.num_key_value_heads, text.layers[0].mlp.hidden_size
    head_dim //= text.config.num_attention_heads
    vision, owners = vision_states(layout, request)
    num_tokens = len(request.token_ids)
    visible = [set(request.visible(position)) for position in range(num_tokens)]
    sees = torch.tensor([[owner in v for owner in owners] for v in visible]).view(num_tokens, -1)
    row_mask = torch.tensor([[float(bool(v))] for v in visible])
    causal = torch.ones(num_tokens, num_tokens).tril().bool()
    x = F.embedding(torch.tensor(request.token_ids), text.embed_tokens.weight)
    for index, layer in enumerate(text.layers):
        is_cross = index in text.config.cross_attention_layers
        if is_cross and not request.images:
            continue
        attention = layer.cross_attn if is_cross else layer.self_attn
        h = norm(x, layer.input_layernorm.weight)
        source = vision if is_cross else h
        query = (h @ attention.q_proj.weight.T).view(num_tokens, -1, head_dim)
        keys = (source @ attention.k_proj.weight.T).view(-1, num_kv_heads, head_dim)
        values = (source @ attention.v_proj.weight.T).view(-1, num_kv_heads, head_dim)
        gates = (1.0, 1.0)
        if is_cross:
            query = norm(query, attention.q_norm.weight)
            keys = norm(keys, attention.k_norm.weight)
            gates = (layer.cross_attn_attn_gate.tanh(), layer.cross_attn_mlp_gate.tanh())
        else:
            query, keys = (rotate(s, text.rotary_emb.inv_freq) for s in (query, keys))
        mixed = heads_attend(query, keys, values, sees if is_cross else causal)
        factor = row_mask if is_cross else 1.0
        x = x + gates[0] * factor * (mixed @ attention.o_proj.weight.T)
        h = norm(x, layer.post_attention_layernorm.weight)
        inner = F.silu(h @ layer.mlp.gate_proj.weight.T) * (h @ layer.mlp.up_proj.weight.T)
        x = x + gates[1] * factor * (inner @ layer.mlp.down_proj.weight.T)
    return norm(x, text.norm.weight) @ model.lm_head.weight.T


def vision_states(layout: str, request: Request) -> tuple[Tensor, list[int]]:
    """Projected states of all images' real tiles, one after the other, and whose each is."""
    inner = oracle(layout).model
    states, owners = [torch.zeros(0, inner.hidden_size)], []
    for index, tiles in enumerate(request.images):
        output = inner.vision_model(
            pixel_values=pixel_values([tiles]),
            aspect_ratio_ids=torch.tensor([[tiles.aspect_ratio_id]]),
            aspect_ratio_mask=(torch.arange(4) < tiles.num_tiles).long()[None, None],
        ).last_hidden_state[0, 0, : tiles.num_tiles]
        states.append(inner.multi_modal_projector(output).flatten(0, 1))
        owners += [index] * len(states[-1])
    return torch.cat(states), owners


@pytest.mark.parametrize("layout", TINY_LAYOUTS)
def test_logits_equal_the_equations_at_every_position(layout: str) -> None:
    batch = requests()
    logits = prefill_logits(runner(layout), batch, chunk=5)
    for request in batch:
        expected = equations(layout, request)
        torch.testing.assert_close(logits[request.request_id], expected, atol=TOLERANCE, rtol=0.0)
