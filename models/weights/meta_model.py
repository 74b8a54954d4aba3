"""The module of a checkpoint on the meta device: every shape and no weight.

Owns the comparison of the configuration with what the weight files hold, before a weight is read.
Knows nothing of devices or memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration

from ..errors import ModelError
from .safetensors_headers import StoredTensor

_STACKS = {
    "text_config.num_hidden_layers": r"model\.language_model\.layers\.(\d+)\.",
    "vision_config.num_hidden_layers": r"model\.vision_model\.transformer\.layers\.(\d+)\.",
    "vision_config.num_global_layers": r"model\.vision_model\.global_transformer\.layers\.(\d+)\.",
}


def build_skeleton(
    folder: Path, tensors: Mapping[str, StoredTensor], dtype: torch.dtype
) -> MllamaForConditionalGeneration:
    """The model that the configuration describes, on the meta device, in `dtype`.

    Raises ModelError, one line, where configuration and weights disagree.
    """
    try:
        config = MllamaConfig.from_pretrained(folder, local_files_only=True)
        _check_depths(folder, config, tensors)
        model: Any = empty_model(config, dtype)
    except ModelError:
        raise
    except Exception as error:  # whatever a wrong value leads to in transformers or torch
        raise ModelError(f"{folder}: config.json describes no Mllama: {one_line(error)}") from error
    _check_shapes(folder, model, tensors)
    return cast(MllamaForConditionalGeneration, model)


def empty_model(config: MllamaConfig, dtype: torch.dtype) -> MllamaForConditionalGeneration:
    """The model of a configuration on the meta device, in `dtype`."""
    with torch.device("meta"):
        model: Any = MllamaForConditionalGeneration(config)
    return cast(MllamaForConditionalGeneration, model.to(dtype))


def _check_depths(folder: Path, config: MllamaConfig, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a wrong number of layers first: a million of them would take minutes to build."""
    for setting, pattern in _STACKS.items():
        part, name = setting.split(".")
        said = getattr(getattr(config, part), name)
        matches = (re.match(pattern, tensor) for tensor in tensors)
        stored = 1 + max((int(match[1]) for match in matches if match), default=-1)
        if said != stored and (stored or said > 1000):
            raise ModelError(
                f"{folder}: config.json says {setting} {said} and the weights have {stored}"
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
                f"{folder}: {name} has the shape {list(tensors[name].shape)}, and config.json "
                f"makes it {list(shape)}: they are of different models"
            )


def one_line(error: BaseException) -> str:
    """The error's message on one line, shortened."""
    return " ".join(str(error).split())[:300] or type(error).__name__
