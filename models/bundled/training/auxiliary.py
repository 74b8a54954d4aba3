"""A second task for the vision encoder in training: predict what each patch and picture shows.

Linear heads, dropped when the model is saved. Their dense signal teaches a tiny encoder much faster
than the words of an answer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..dataset.config import FEATURES, HIDDEN, MAX_TILES, PATCH_SIZE, PATCHES_PER_TILE
from ..dataset.data import IGNORE, Pictures
from ..pictures import BACKGROUNDS, KINDS, MAX_SHAPES


class PictureHeads(nn.Module):
    """Linear heads on the vision encoder's features."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = nn.Linear(FEATURES, len(KINDS) + 1)
        self.colour = nn.Linear(FEATURES, len(BACKGROUNDS))
        self.is_centre = nn.Linear(FEATURES, 2)
        self.place = nn.Linear(FEATURES, 3)
        self.outline = nn.Linear(FEATURES, (PATCH_SIZE // 2) ** 2)
        self.background = nn.Linear(HIDDEN, len(BACKGROUNDS))
        self.count = nn.Linear(HIDDEN, MAX_SHAPES + 1)
        self.kind_counts = nn.Linear(HIDDEN, len(KINDS) * (MAX_SHAPES + 1))

    def forward(self, features: Tensor, pictures: Pictures) -> dict[str, Tensor]:
        """The loss of each head. features: [pictures, 1, 4, 17, 384], class token first."""
        patches = features[:, 0, :, 1:]
        pooled = self._pool(patches[..., :HIDDEN], pictures.aspect_ratio_mask)
        # weighted, since most patches are background
        weight = torch.tensor([1.0, 4.0])
        kind_weight = torch.tensor([0.3] + [1.0] * len(KINDS))
        kind_counts = self.kind_counts(pooled).unflatten(-1, (len(KINDS), -1))
        return {
            "kind": 2 * _loss(self.kind(patches), pictures.kind, kind_weight),
            "colour": _loss(self.colour(patches), pictures.colour),
            "centre": _loss(self.is_centre(patches), pictures.is_centre, weight),
            # teaches edges of any colour: without it, kinds were hardly distinguished
            "outline": 4 * _outline_loss(self.outline(patches), pictures.outline),
            "place": _place_loss(self.place(patches), pictures.place),
            "background": _loss(self.background(pooled), pictures.background),
            "count": _loss(self.count(pooled), pictures.count),
            "kind_counts": _loss(kind_counts, pictures.kind_counts),
        }

    @staticmethod
    def _pool(patches: Tensor, tile_mask: Tensor) -> Tensor:
        """The mean over the patches of the tiles in use: [pictures, hidden]."""
        mask = tile_mask.reshape(-1, MAX_TILES, 1, 1).to(patches.dtype)
        return (patches * mask).sum((1, 2)) / (mask.sum((1, 2)) * PATCHES_PER_TILE)


def _loss(logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross entropy in float32, over the last dimension of the logits."""
    return functional.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), weight=weight, ignore_index=IGNORE
    )


def _outline_loss(logits: Tensor, coverage: Tensor) -> Tensor:
    """Mean binary cross entropy over the cells of patches."""
    return functional.binary_cross_entropy_with_logits(logits.float(), coverage)


def _place_loss(places: Tensor, labels: Tensor) -> Tensor:
    """Mean distance in patches, over shapes' patches; teaches which patches belong together."""
    is_shape = ~labels.isnan().any(-1)
    if not is_shape.any():
        return places.float().sum() * 0
    return functional.smooth_l1_loss(places.float()[is_shape], labels[is_shape], beta=0.3)


@torch.no_grad()
def accuracies(heads: PictureHeads, features: Tensor, pictures: Pictures) -> dict[str, float]:
    """The shares of shape patches with the right kind and colour, and of right counts."""
    patches = features[:, 0, :, 1:]
    pooled = heads._pool(patches[..., :HIDDEN], pictures.aspect_ratio_mask)
    is_shape = pictures.kind > 0
    kind_right = heads.kind(patches).argmax(-1) == pictures.kind
    colour_right = heads.colour(patches).argmax(-1) == pictures.colour
    return {
        "kind": kind_right[is_shape].float().mean().item(),
        "colour": colour_right[is_shape].float().mean().item(),
        "count": (heads.count(pooled).argmax(-1) == pictures.count).float().mean().item(),
    }
