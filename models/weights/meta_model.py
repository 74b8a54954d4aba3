"""A checkpoint's model on the meta device: every shape and no weight.

Compares the configuration with the headers of the weight files, before a weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import MllamaConfig, MllamaForConditionalGeneration

from ..checkpoint import INDEX, SINGLE
from ..errors import ModelError
from .device_map import EMBEDDING, HEAD
from .formats.safetensors_headers import StoredTensor

MATRIX = 2
# Mllama's embedding has eight rows beyond the vocabulary, `<|image|>` first
NUM_EXTRA_ROWS = 8

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
        _check_vocabulary(folder, config, tensors)
        _check_shapes(folder, model, tensors)
    except ModelError as error:
        raise ModelError(f"{error}{_of_two(folder)}") from None
    except Exception as error:  # a wrong value raises anything in transformers or torch
        raise ModelError(
            f"{folder}: config.json does not describe a Mllama: {one_line(error)}"
        ) from error
    return cast(MllamaForConditionalGeneration, model)


def without_quantization(config: MllamaConfig) -> MllamaConfig:
    """The configuration without quantization settings: the headers have the storage format."""
    for part in (config, config.text_config, config.vision_config):
        for key in ("quantization_config", "compression_config"):
            if hasattr(part, key):
                delattr(part, key)
    return config


class _Undrawn(TorchFunctionMode):
    """Leaves out torch's initialization of weights, half of the time also on the meta device.

    For this thread alone: transformers' `no_init_weights` and accelerate's `init_empty_weights`
    replace functions for the whole process, and two threads at once leave them replaced.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def empty_model(config: MllamaConfig, dtype: torch.dtype) -> MllamaForConditionalGeneration:
    """The model of a configuration on the meta device, in `dtype`."""
    with torch.device("meta"), _Undrawn():
        model: Any = MllamaForConditionalGeneration(config)
    return cast(MllamaForConditionalGeneration, model.to(dtype))


def model_without_weights(config: MllamaConfig) -> MllamaForConditionalGeneration:
    """The model of a configuration: its weights on the meta device, its buffers on the CPU."""
    model = empty_model(config, torch.float32)
    text: Any = model.model.language_model
    text.rotary_emb = type(text.rotary_emb)(config.text_config)  # has all buffers of a Mllama
    return model


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


def is_short(name: str, rows: int, config: MllamaConfig) -> bool:
    """Whether a weight is an embedding without Mllama's rows beyond the vocabulary.

    transformers' resize_token_embeddings leaves out those rows. They are zeros in the model.
    """
    text: Any = config.text_config
    return bool(name == f"{EMBEDDING}.weight" and rows == text.vocab_size)


def _check_vocabulary(
    folder: Path, config: MllamaConfig, tensors: Mapping[str, StoredTensor]
) -> None:
    """Reject a head or an embedding with other rows than a resized vocabulary would give."""
    text: Any = config.text_config
    size, image = text.vocab_size, config.image_token_index
    rows = {part: _rows(tensors.get(f"{part}.weight")) for part in (EMBEDDING, HEAD)}
    if rows[HEAD] not in (None, size):
        raise ModelError(
            f"{folder}: {HEAD}.weight has {rows[HEAD]} rows, but config.json has the vocab_size "
            f"{size}: if the vocabulary was resized, set text_config.vocab_size to {rows[HEAD]}"
        )
    if rows[EMBEDDING] not in (None, size, size + NUM_EXTRA_ROWS):
        raise ModelError(
            f"{folder}: {EMBEDDING}.weight has {rows[EMBEDDING]} rows, but a vocab_size of {size} "
            f"needs {size + NUM_EXTRA_ROWS}, or {size} of a resized vocabulary"
        )
    if (found := rows[EMBEDDING]) is not None and image >= found:
        raise ModelError(
            f"{folder}: {EMBEDDING}.weight has {found} rows, and none for the token of images, "
            f"image_token_index {image}: resize the vocabulary to more tokens"
        )


def _rows(tensor: StoredTensor | None) -> int | None:
    return tensor.shape[0] if tensor is not None and len(tensor.shape) == MATRIX else None


def _check_shapes(
    folder: Path, model: MllamaForConditionalGeneration, tensors: Mapping[str, StoredTensor]
) -> None:
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if missing := sorted(set(shapes) - set(tensors)):
        raise ModelError(f"{folder}: {len(missing)} weights are missing, {missing[0]} among them")
    for name, shape in shapes.items():
        found = tensors[name].shape
        if found != shape and not is_short(name, found[0] if found else 0, model.config):
            raise ModelError(
                f"{folder}: {name} has the shape {list(found)}, but config.json "
                f"gives {list(shape)}: the files belong to different models"
            )


def _of_two(folder: Path) -> str:
    """The remedy if the folder has a whole file and an index; else nothing."""
    if not ((folder / SINGLE).is_file() and (folder / INDEX).is_file()):
        return ""
    return f"; {SINGLE} is read and {INDEX} is not: if {SINGLE} is of an earlier save, remove it"


def one_line(error: BaseException) -> str:
    """The error's message on one line, shortened."""
    return " ".join(str(error).split())[:300] or type(error).__name__
