"""The model before training: random weights, at scales that let a tiny model start fast.

transformers' scale of 0.02 suits widths of thousands. At 128 it leaves attention uniform, and
positions without effect, for the first thousand steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import MllamaForConditionalGeneration
from transformers.models.mllama.image_processing_pil_mllama import (
    get_all_supported_aspect_ratios,
)
from transformers.models.mllama.modeling_mllama import MllamaPrecomputedPositionEmbedding

from ..dataset.config import HIDDEN, MAX_TILES, PATCH_SIZE, TILE_SIZE, model_config

_GRID = TILE_SIZE // PATCH_SIZE
_OUTPUTS = ("o_proj", "fc2", "down_proj")
_VISION_GATE = 0.8
_CROSS_GATE = 1.0


def untrained_model(seed: int) -> MllamaForConditionalGeneration:
    """A new model in float32; the same for the same seed."""
    torch.manual_seed(seed)
    config = model_config()
    config._attn_implementation = "eager"  # SDPA's bfloat16 backward is slower on a CPU
    model = MllamaForConditionalGeneration(config)
    with torch.no_grad():
        _scale_matrices(model)
        _open_gates(model)
        embedding = model.model.vision_model.gated_positional_embedding
        _place_patches(embedding, get_all_supported_aspect_ratios(MAX_TILES))
    return model


def _scale_matrices(model: nn.Module) -> None:
    """Unit gain for each linear layer, less for those that write to the residual stream."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            gain = 0.4 if name.endswith(_OUTPUTS) else 1.0
            nn.init.normal_(module.weight, std=gain / math.sqrt(module.in_features))
        elif name.endswith("embed_tokens"):
            nn.init.normal_(module.weight, std=0.3)


def _open_gates(model: nn.Module) -> None:
    """Open the gates, so that pictures count from the first step."""
    for name, parameter in model.named_parameters():
        if name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate")):
            parameter.fill_(_CROSS_GATE)
        elif name.endswith(("gate_attn", "gate_ffn", "positional_embedding.gate")):
            parameter.fill_(_VISION_GATE)


def _place_patches(
    embedding: MllamaPrecomputedPositionEmbedding, aspect_ratios: list[tuple[int, int]]
) -> None:
    """Start with sines of each patch's position on the canvas, independent of its tile.

    The tile embedding is [aspect ratio ids, 4 tiles * 17 patches * hidden], class token first.
    """
    table = embedding.tile_embedding.weight.view(-1, MAX_TILES, embedding.num_patches, HIDDEN)
    for aspect_ratio_id, (rows, columns) in enumerate(aspect_ratios, start=1):
        for tile in range(rows * columns):
            top, left = tile // columns * _GRID, tile % columns * _GRID
            y, x = (torch.arange(_GRID) + start for start in (top, left))
            places = torch.cat(
                [
                    _sines(y)[:, None].expand(_GRID, _GRID, -1),
                    _sines(x)[None].expand(_GRID, _GRID, -1),
                ],
                dim=-1,
            )
            table[aspect_ratio_id, tile, 1:] = places.reshape(-1, HIDDEN)


def _sines(positions: Tensor) -> Tensor:
    """Sines and cosines with wavelengths from 4 to 64 patches: [positions, hidden / 2]."""
    wavelengths = 4 * 16 ** torch.linspace(0, 1, HIDDEN // 4)
    angles = positions[:, None] * (2 * math.pi / wavelengths)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
