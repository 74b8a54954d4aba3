"""Attention of the vision model without its mask: real patches come first.

transformers pads an image to `max_num_tiles` tiles and a tile to a multiple of 8 patches. Its mask
([positions, positions], 83 MB for one published image) forbids one thing: a padding position does
not see padding positions. A real patch sees every position, padding included. With the real patches
in front, two calls without a mask compute the same, and flash kernels take both:

    real queries     over all keys
    padding queries  over the real keys

Source: `_prepare_aspect_ratio_attention_mask` of transformers' modeling_mllama.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

REAL_FIRST_NAME = "vlmserve_real_first"


@dataclass(slots=True, frozen=True)
class RealFirst:
    """The order of the positions of images that are encoded together.

    num_tiles: real tiles of each image; max_num_tiles: with padding. num_patches: real positions of
    a tile; padded_patches: with padding.
    """

    num_tiles: tuple[int, ...]
    max_num_tiles: int
    num_patches: int
    padded_patches: int

    @property
    def num_real(self) -> list[int]:
        """How many real positions each image has; they come first."""
        return [count * self.num_patches for count in self.num_tiles]

    def ordered(self, states: Tensor) -> Tensor:
        """[images, max_num_tiles, padded_patches, width] to [images, positions, width]."""
        return _for_alike(self._ordered, self.num_tiles, states)

    def by_tile(self, states: Tensor) -> Tensor:
        """The reverse of `ordered`."""
        return _for_alike(self._by_tile, self.num_tiles, states)

    def _ordered(self, count: int, images: Tensor) -> Tensor:
        real, rest = images[:, :count].split([self.num_patches, self._num_rest], dim=2)
        return torch.cat([part.flatten(1, 2) for part in (real, rest, images[:, count:])], dim=1)

    def _by_tile(self, count: int, images: Tensor) -> Tensor:
        empty = (self.max_num_tiles - count) * self.padded_patches
        sizes = [count * self.num_patches, count * self._num_rest, empty]
        real, rest, empty_tiles = images.split(sizes, dim=1)
        tiles = torch.cat([part.unflatten(1, (count, -1)) for part in (real, rest)], dim=2)
        return torch.cat([tiles, empty_tiles.unflatten(1, (-1, self.padded_patches))], dim=1)

    @property
    def _num_rest(self) -> int:
        return self.padded_patches - self.num_patches


def real_first_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: RealFirst | Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function of the vision model: [images, positions, heads, head_dim].

    query, key, value: [images, heads, positions, head_dim], in the order of `attention_mask`. With
    transformers' own mask it is transformers' SDPA.
    """
    if not isinstance(attention_mask, RealFirst):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )

    def attended(num_real: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        real, padding = query.split([num_real, query.shape[2] - num_real], dim=2)
        parts = [_attend(real, key, value, scaling)]
        if padding.shape[2]:
            parts.append(_attend(padding, key[:, :, :num_real], value[:, :, :num_real], scaling))
        return torch.cat(parts, dim=1)

    return _for_alike(attended, attention_mask.num_real, query, key, value), None


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """[images, positions, heads, head_dim], from [images, heads, positions, head_dim].

    torch takes its flash kernels: there is no mask, and there are four dimensions.
    """
    attended = functional.scaled_dot_product_attention(query, key, value, scale=scaling)
    return attended.transpose(1, 2)


def _for_alike(work: Callable[..., Tensor], counts: Sequence[int], *images: Tensor) -> Tensor:
    """`work(count, *images)` in one call where all images have the same count, else in one each."""
    if len(set(counts)) == 1:
        return work(counts[0], *images)
    rows = (work(count, *(one[i : i + 1] for one in images)) for i, count in enumerate(counts))
    return torch.cat(list(rows))


AttentionInterface.register(REAL_FIRST_NAME, real_first_attention)
