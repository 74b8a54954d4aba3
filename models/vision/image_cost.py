"""Estimates how many prompt tokens take as long to compute as one image takes to encode.

Counts multiplications: both are large matrix products, so time grows with their number alike.
"""

from __future__ import annotations

from typing import Any

from transformers import MllamaConfig

from .layered_encoder import padded_patches


def image_cost_tokens(config: MllamaConfig) -> int:
    """The cost, at least 1. It is the same for all images, which are padded to the same size."""
    return max(1, round(_image_products(config) / _token_products(config)))


def _image_products(config: MllamaConfig) -> int:
    """Multiplications of the encoder, the projector and the cross layers' keys and values."""
    vision: Any = config.vision_config
    text: Any = config.text_config
    width = vision.hidden_size
    num_patches = (vision.image_size // vision.patch_size) ** 2 + 1
    kept = vision.max_num_tiles * num_patches
    padded = vision.max_num_tiles * padded_patches(num_patches)
    layer = padded * (4 * width**2 + 2 * width * vision.intermediate_size) + 2 * padded**2 * width
    num_layers = vision.num_hidden_layers + vision.num_global_layers
    embedding = kept * vision.num_channels * vision.patch_size**2 * width
    projector = kept * vision.vision_output_dim * text.hidden_size
    keys = len(text.cross_attention_layers) * kept * text.hidden_size * 2 * kv_width(text)
    return int(num_layers * layer + embedding + projector + keys)


def _token_products(config: MllamaConfig) -> int:
    """Multiplications of a token that sees an image, in all decoder layers."""
    text: Any = config.text_config
    hidden, num_cross = text.hidden_size, len(text.cross_attention_layers)
    every = 2 * hidden**2 + 3 * hidden * text.intermediate_size
    num_self = text.num_hidden_layers - num_cross
    return int(text.num_hidden_layers * every + num_self * 2 * hidden * kv_width(text))


def kv_width(text: Any) -> int:
    """Values of one token's keys in one layer."""
    return int(text.num_key_value_heads * (text.hidden_size // text.num_attention_heads))
