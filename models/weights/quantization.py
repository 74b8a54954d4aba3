"""The methods of --quantize, which store the decoder's linear layers in 8 or 4 bits.

Owns the methods' names, the modules that stay in the compute dtype, and bitsandbytes' settings.
bitsandbytes is an extra, imported only for its own methods; transformers then quantizes while it
loads. `int8` and `fp8` are this project's own (models/decoder/int8/, models/decoder/coded/).

    int8               int8 weights by row; products in the compute dtype
    fp8                FP8 E4M3 weights by row; products in the compute dtype
    bitsandbytes       LLM.int8 (Dettmers et al., 2022): int8 weights by row, outlier columns of the
                       activations in the compute dtype
    bitsandbytes-nf4   NF4 (Dettmers et al., 2023): 4 bits in blocks of 64 weights
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from ..errors import ModelError

WEIGHT_ONLY, FP8, INT8, NF4 = "int8", "fp8", "bitsandbytes", "bitsandbytes-nf4"
METHODS = (WEIGHT_ONLY, FP8, INT8, NF4)
# a checkpoint in 4 bits with groups of 128 weights: for estimates only
INT4 = "int4"
INT4_GROUP = 128
# made by this project while it loads, on any device and by any number of ranks
OWN_METHODS = (WEIGHT_ONLY, FP8)
# gates, norms and the embedding are not linear layers, so they are never quantized
KEPT_MODULES = ("model.vision_model", "model.multi_modal_projector", "lm_head")
NF4_BLOCK = 64
_CPU_PACKED_ROWS = 32


def quantization_config(method: str | None, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The settings for transformers; None if it does not quantize. Raises ModelError."""
    if method is None:
        return None
    if method not in METHODS:
        raise ModelError(f"quantization {method!r} is unknown: use one of {', '.join(METHODS)}")
    if method in OWN_METHODS:
        return None
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            f"--quantize {method} needs the package bitsandbytes: pip install 'vlmserve[quantize]'"
        )
    # it warns for every product that is not float16, and for a kernel that it cannot download
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    kept = list(KEPT_MODULES)
    if method == INT8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )


def is_quantized(name: str) -> bool:
    """Whether a method quantizes the model's weight of that name."""
    return name.startswith("model.language_model.layers.") and name.endswith("_proj.weight")


def quantized_bytes(method: str, shape: Sequence[int]) -> int:
    """Bytes of a quantized weight of that shape, with its float32 scales."""
    rows, count = shape[0], math.prod(shape)
    if method in (*OWN_METHODS, INT8):
        return count + 4 * rows
    block = INT4_GROUP if method == INT4 else NF4_BLOCK
    return -(-count // 2) + 4 * -(-count // block)


def settle(model: nn.Module, dtype: torch.dtype) -> None:
    """Make each 4-bit layer on a CPU compute in the compute dtype, for any shape.

    bitsandbytes rearranges 4-bit weights for bfloat16 instructions at their first use. That fails
    for shapes that are not multiples of its blocks, and computes float32 activations in bfloat16.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            layer: Any = module
            is_whole = not (layer.in_features % NF4_BLOCK or layer.out_features % _CPU_PACKED_ROWS)
            if dtype != torch.bfloat16 or not is_whole:
                layer.support_avx512bf16_for_cpu = False
