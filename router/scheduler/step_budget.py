"""One step as it is planned: who and what is in it, and what it may still take.

Owns the step's budgets. Knows nothing of who comes first, nor of where blocks come from.

While streams run, which wait for the step's end to get their next token, encoding counts against
the budget of tokens at its cost, so that a step with pictures takes no longer than one with a full
chunk of text. Where not even one image fits, a part of it is encoded: some of its layers, at least
one. Where nobody streams, images are bounded by their number alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ...models.batch import BlockCopy, ImageToEncode, StepBatch
from ..blocks.block_pool import ImageEntry
from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class ImageCost:
    """What an image takes: as many tokens of the budget, evenly over its layers."""

    num_tokens: int
    num_layers: int

    def of(self, num_layers: int) -> int:
        """Tokens that so many layers count as."""
        return -(-self.num_tokens * num_layers // self.num_layers)

    def layers_for(self, num_tokens: int) -> int:
        """How many layers count as so many tokens at most."""
        return num_tokens * self.num_layers // self.num_tokens


@dataclass(slots=True)
class Step:
    """The step being planned or computed.

    budget: tokens that it may still take; image_budget: images. has_streams: the next token of
    running streams is in it. due_images: those that are encoded to the end. partial: the image of
    which only a part is, then the layers before partial_end.
    """

    budget: int
    image_budget: int
    image_cost: ImageCost
    has_streams: bool = False
    batch: StepBatch = field(default_factory=StepBatch)
    sequences: list[Sequence] = field(default_factory=list)
    due_images: list[ImageEntry] = field(default_factory=list)
    partial: ImageEntry | None = None
    partial_end: int = 0
    copies: dict[Sequence, BlockCopy] = field(default_factory=dict)

    @property
    def can_begin_image(self) -> bool:
        """True if a new image, or a part of it, can be encoded in this step too."""
        return self._layers_within(self.image_cost.num_layers) > 0

    def encode(self, entry: ImageEntry) -> bool:
        """Plan what can be encoded of `entry`; True if this step encodes it to the end."""
        if entry in self.due_images:
            return True
        total = self.image_cost.num_layers
        begin = entry.num_layers
        num_layers = self._layers_within(total - begin)
        if num_layers == 0:
            return False
        assert entry.image is not None, "only an encoded image gives up its tiles"
        end = begin + num_layers
        self.batch.images.append(
            ImageToEncode(entry.image, entry.block_ids, begin, None if end == total else end)
        )
        self.image_budget -= 1
        if self.has_streams:
            self.budget -= min(self.budget, self.image_cost.of(num_layers))
        if end < total:
            self.partial, self.partial_end = entry, end
            self.image_budget = 0
            return False
        self.due_images.append(entry)
        return True

    def _layers_within(self, num_left: int) -> int:
        """How many of an image's last `num_left` layers this step may take."""
        if self.image_budget == 0:
            return 0
        if not self.has_streams or self.image_cost.of(num_left) <= self.budget:
            return num_left
        # A part goes alone: only one image at a time is kept between steps.
        return 0 if self.batch.images else max(1, self.image_cost.layers_for(self.budget))
