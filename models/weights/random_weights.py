"""Random weights of any configuration, drawn on the device: for measuring what needs no real ones.

Owns what each kind of tensor is drawn from. Knows nothing of devices' memory or of how a model is
put together. Nothing is written to or read from a disk.

A tensor's numbers depend on the seed, its name and the device's kind, not on what is drawn beside
it: models of several dtypes, and quantized ones, round the same weights.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import MllamaConfig

from ..tensor_parallel.plan import Side, share_of
from ..vision.encoder import ImageNormalization
from .loader import Checkpoint
from .meta_model import empty_model
from .safetensors_headers import StoredTensor
from .tensor_loader import RankShare, Read

STD = 0.02
# a gate of 0 would hide its layer
GATE = 0.7
# the published checkpoint's
NORMALIZATION = ImageNormalization(
    scale=1 / 255,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)


def random_checkpoint(config: MllamaConfig, dtype: torch.dtype, seed: int = 0) -> Checkpoint:
    """What `create_runner` takes in a folder's place. It has no tokenizer: no grammars."""
    skeleton = empty_model(config, dtype)
    tensors = {
        name: StoredTensor(name, "", tuple(parameter.shape), parameter.nbytes)
        for name, parameter in skeleton.named_parameters()
    }
    draw = _Draw(tensors, dtype, seed)
    return Checkpoint(Path("random weights"), NORMALIZATION, tensors, skeleton, dtype, draw)


@dataclass(slots=True, frozen=True)
class _Draw:
    """Called with a device, draws all tensors there, one by one."""

    tensors: dict[str, StoredTensor]
    dtype: torch.dtype
    seed: int

    def __call__(self, device: torch.device) -> Iterator[tuple[StoredTensor, Read]]:
        for tensor in self.tensors.values():
            yield tensor, self._reader(tensor, device)

    def _reader(self, tensor: StoredTensor, device: torch.device) -> Read:
        def read(side: Side | None, share: RankShare) -> Tensor:
            generator = torch.Generator(device)
            generator.manual_seed(self.seed + zlib.crc32(tensor.name.encode()))
            exact = torch.empty(tensor.shape, dtype=torch.float32, device=device)
            _fill(exact, tensor.name, generator)
            whole = exact.to(self.dtype)
            if side is None or whole.dim() <= side:
                return whole
            part = share_of(whole.shape[side], share.rank, share.size)
            return (whole[part] if side is Side.OUT else whole[:, part]).contiguous()

        return read


def _fill(tensor: Tensor, name: str, generator: torch.Generator) -> None:
    if tensor.numel() == 1 and "gate" in name:
        tensor.fill_(GATE)
    elif name.endswith("norm.weight"):
        tensor.uniform_(0.5, 1.5, generator=generator)  # ones would hide a norm left out
    else:
        tensor.normal_(0.0, STD, generator=generator)
