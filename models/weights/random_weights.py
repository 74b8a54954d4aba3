"""Random weights of any configuration, created on the device, for measurements.

Owns each tensor's distribution. Nothing is read from or written to a disk.

A tensor's values depend only on the seed, its name and the device's type, so models of several
dtypes, and quantized models, round the same weights.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import MllamaConfig

from ..tensor_parallel.plan import Side, rank_slice
from ..vision.encoder import ImageNormalization
from .formats.safetensors_headers import StoredTensor
from .loader import Checkpoint
from .meta_model import empty_model
from .tensor_loader import RankShare, Read

STD = 0.02
# a gate of 0 would hide its layer
GATE = 0.7
# as in the published checkpoint
NORMALIZATION = ImageNormalization(
    scale=1 / 255,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)


def random_checkpoint(config: MllamaConfig, dtype: torch.dtype, seed: int = 0) -> Checkpoint:
    """A checkpoint for `create_runner` without a folder. It has no tokenizer, so no grammars."""
    meta_model = empty_model(config, dtype)
    tensors = {
        name: StoredTensor(name, "", tuple(parameter.shape), parameter.nbytes)
        for name, parameter in meta_model.named_parameters()
    }
    draw = _Draw(tensors, dtype, seed)
    return Checkpoint(Path("random weights"), NORMALIZATION, tensors, meta_model, dtype, draw)


@dataclass(slots=True, frozen=True)
class _Draw:
    """Draws all tensors on the device that it is called with, one by one."""

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
            part = rank_slice(whole.shape[side], share.rank, share.size)
            return (whole[part] if side is Side.OUT else whole[:, part]).contiguous()

        return read


def _fill(tensor: Tensor, name: str, generator: torch.Generator) -> None:
    if tensor.numel() == 1 and "gate" in name:
        tensor.fill_(GATE)
    elif name.endswith("norm.weight"):
        tensor.uniform_(
            0.5, 1.5, generator=generator
        )  # with ones, a missing norm would go unnoticed
    else:
        tensor.normal_(0.0, STD, generator=generator)
