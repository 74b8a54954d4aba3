"""A checkpoint's model on the meta device: every shape and no weight.

Compares the configuration with the headers of the weight files, before a weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration

from ..errors import ModelError
from .formats.safetensors_headers import StoredTensor

_STACKS = {
    "text_config.num_hidden_layers": r"model\.language_model\.layers\.(\d+)\.",
    "vision_config.num_hidden_layers": r"model\.vision_model\.transformer\.layers\.(\d+)\.",
    "vision_config.num_global_layers": r"model\.vision_model\.global_transformer\.layers\.(\d+)\.",
}


def build_meta_model(
    folder: Path, tensors: Mapping[str, StoredTensor], dtype: torch.dtype
) -> MllamaForConditionalGeneration:
    """The model that the configuration describes, on the meta device, in `dtype`.

    Raises ModelError, one line, if configuration and weights disagree.
    """
    try:
        config = without_quantization(MllamaConfig.from_pretrained(folder, local_files_only=True))
        _check_depths(folder, config, tensors)
        model: Any = empty_model(config, dtype)
    except ModelError:
        raise
    except Exception as error:  # a wrong value raises anything in transformers or torch
        raise ModelError(
            f"{folder}: config.json does not describe a Mllama: {one_line(error)}"
        ) from error
    _check_shapes(folder, model, tensors)
    return cast(MllamaForConditionalGeneration, model)


def without_quantization(config: MllamaConfig) -> MllamaConfig:
    """The configuration without quantization settings: the headers say how weights are stored."""
    for part in (config, config.text_config, config.vision_config):
        for key in ("quantization_config", "compression_config"):
            if hasattr(part, key):
                delattr(part, key)
    return config


def empty_model(config: MllamaConfig, dtype: torch.dtype) -> MllamaForConditionalGeneration:
    """The model of a configuration on the meta device, in `dtype`."""
    with torch.device("meta"):
        model: Any = MllamaForConditionalGeneration(config)
    return cast(MllamaForConditionalGeneration, model.to(dtype))


def _check_depths(folder: Path, config: MllamaConfig, tensors: Mapping[str, StoredTensor]) -> None:
    """Reject a wrong number of layers first: building a million layers would take minutes."""
    for setting, pattern in _STACKS.items():
        part, name = setting.split(".")
        configured = getattr(getattr(config, part), name)
        matches = (re.match(pattern, tensor) for tensor in tensors)
        stored = 1 + max((int(match[1]) for match in matches if match), default=-1)
        if configured != stored and (stored or configured > 1000):
            raise ModelError(
                f"{folder}: config.json has {setting} {configured} and the weights have {stored}"
            )


def _check_shapes(
    folder: Path, model: MllamaForConditionalGeneration, tensors: Mapping[str, StoredTensor]
) -> None:
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if missing := sorted(set(shapes) - set(tensors)):
        raise ModelError(f"{folder}: {len(missing)} weights are missing, {missing[0]} among them")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ModelError(
                f"{folder}: {name} has the shape {list(tensors[name].shape)}, but config.json "
                f"gives {list(shape)}: the files belong to different models"
            )


def one_line(error: BaseException) -> str:
    """The error's message on one line, shortened."""
    return " ".join(str(error).split())[:300] or type(error).__name__
