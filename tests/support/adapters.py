"""Adapters written by hand as PEFT writes them, and the models that they would be merged to.

Owns random matrices of any targets, and the names of both lines of transformers.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import MllamaForConditionalGeneration

from vlmserve.models.batch import AdapterRef
from vlmserve.models.lora.files import CONFIG, WEIGHTS, digest_of

# the size of a change, relative to a weight of order 1 / sqrt(in)
STRENGTH = 0.5


def by_old_name(name: str) -> str:
    """A layer's name before transformers 4.52."""
    return re.sub(
        r"^model\.(?:(language_model)\.|(vision_model|multi_modal_projector))",
        lambda match: "language_model.model." if match[1] else match[2],
        name,
    )


def by_text_name(name: str) -> str:
    """A decoder layer's name in a model of the text alone."""
    return name.replace("model.language_model.", "model.")


@dataclass
class Adapter:
    """A random adapter. targets: matches the names of its layers; ranks, alphas: by a pattern.

    settings: more of adapter_config.json. rename: the layers' names in the file.
    """

    targets: str
    rank: int = 4
    alpha: float = 8.0
    seed: int = 0
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    rename: Callable[[str], str] = str
    prefix: str = "base_model.model."
    dtype: torch.dtype = torch.float32

    def layers(self, model: nn.Module) -> dict[str, nn.Linear]:
        """The layers that it changes, by name."""
        return {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
            and name != "lm_head"
            and re.fullmatch(self.targets, name)
        }

    def rank_of(self, name: str) -> int:
        """The rank of a layer."""
        return _by_end(self.ranks, self.rename(name), self.rank)

    def scale_of(self, name: str) -> float:
        """What the product of both matrices is multiplied with."""
        alpha, rank = _by_end(self.alphas, self.rename(name), self.alpha), self.rank_of(name)
        return alpha / (rank**0.5 if self.settings.get("use_rslora") else rank)

    def matrices(self, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B of each layer, rounded to the file's type."""
        generator = torch.Generator().manual_seed(self.seed)
        found = {}
        for name, layer in self.layers(model).items():
            rank, scale = self.rank_of(name), self.scale_of(name)
            a = torch.randn(rank, layer.in_features, generator=generator) / layer.in_features**0.5
            b = torch.randn(layer.out_features, rank, generator=generator)
            b *= STRENGTH / (scale * rank**0.5)
            found[name] = (a.to(self.dtype), b.to(self.dtype))
        return found

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """What the file has, by name."""
        found = {}
        for name, pair in self.matrices(model).items():
            for matrix, tensor in zip("AB", pair, strict=True):
                found[f"{self.prefix}{self.rename(name)}.lora_{matrix}.weight"] = tensor
        return found

    def config(self) -> dict[str, Any]:
        """adapter_config.json."""
        return {
            "peft_type": "LORA",
            "base_model_name_or_path": "meta-llama/Llama-3.2-11B-Vision-Instruct",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.05,
            "bias": "none",
            "target_modules": self.targets,
            "rank_pattern": dict(self.ranks),
            "alpha_pattern": dict(self.alphas),
            **self.settings,
        }

    def write(self, folder: Path, model: nn.Module, name: str = "adapter") -> AdapterRef:
        """Save both files; what names the adapter."""
        return written(folder, self.config(), self.tensors(model), name)

    def merged(self, model: MllamaForConditionalGeneration) -> MllamaForConditionalGeneration:
        """A copy of the model with the adapter in its weights."""
        result = copy.deepcopy(model)
        for name, (a, b) in self.matrices(model).items():
            weight = result.get_submodule(name).weight.data
            weight += (self.scale_of(name) * b.double() @ a.double()).to(weight.dtype)
        return result


def written(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str = "adapter"
) -> AdapterRef:
    """An adapter's folder with these settings and tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(
        {key: tensor.contiguous().clone() for key, tensor in tensors.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    return AdapterRef(name, str(folder), digest_of(folder))


ALL = r"model\..*"
TEXT = r"model\.language_model\..*"
VISION = r"model\.(vision_model|multi_modal_projector).*"
# of the kinds that PEFT and Unsloth write, and of one kind of layer each
MIXED = {
    "all": Adapter(ALL, rank=4, seed=1),
    "qv": Adapter(r".*\.(q_proj|v_proj)", rank=8, alpha=16, seed=2, rename=by_old_name),
    "text": Adapter(TEXT, rank=3, alpha=1, seed=3, settings={"use_rslora": True}),
    "vision": Adapter(VISION, rank=5, seed=4),
    "image-keys": Adapter(r".*cross_attn\.(k_proj|v_proj)", rank=2, seed=5, dtype=torch.float16),
    "mlp": Adapter(r".*\.(gate_proj|up_proj|down_proj|fc1|fc2)", rank=4, seed=6, prefix=""),
    "patterns": Adapter(
        ALL, rank=4, seed=7, ranks={r"layers\.[01]\..*": 7, "q_proj": 1}, alphas={"o_proj": 3}
    ),
    "output": Adapter(
        r"model\.language_model.*(self_attn\.o_proj|gate_proj)", seed=8, rename=by_text_name
    ),
}


def _by_end(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    keys: Iterable[str] = (one for one in patterns if re.fullmatch(rf"(.*\.)?({one})", name))
    return next((patterns[key] for key in keys), default)
