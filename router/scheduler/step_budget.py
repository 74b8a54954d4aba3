"""One step while it is planned: its sequences and images, and what it may still compute.

Owns the step's budgets, and how owners share them (`quotas`). Knows nothing of the order of
sequences, nor of how blocks are allocated.

While streams run, their next tokens wait for the end of the step. So encoding an image then uses
the token budget at its cost: a step with images takes no longer than a step with a full chunk of
text. An image that does not fit is encoded in parts, at least one layer per step. Without streams,
only the number of images is limited.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ...models.batch import INSERTED_PART, BlockCopy, ImageToEncode, StepBatch
from ..blocks.image_pool import ImageEntry
from ..blocks.tile_store import TileStore
from ..blocks.visibility import is_seen
from .interface import SchedulerLimits
from .owners import Owners
from .request_queue import RequestQueue
from .sequence import Sequence
from .throughput import StepTimes


@dataclass(frozen=True, slots=True)
class ImageCost:
    """The cost of encoding an image, in tokens of the budget, spread evenly over its layers."""

    num_tokens: int
    num_layers: int

    def of(self, num_layers: int) -> int:
        """The cost of this many layers, in tokens."""
        return -(-self.num_tokens * num_layers // self.num_layers)

    def layers_for(self, num_tokens: int) -> int:
        """How many layers cost at most this many tokens."""
        return num_tokens * self.num_layers // self.num_tokens


@dataclass(slots=True)
class Step:
    """The step being planned or computed.

    budget: how many more tokens it may compute; image_budget: how many more images. quotas: how
    many of these tokens each owner may use; empty if they do not share. has_streams: it has the
    next token of running streams. due_images: complete after this step. loaded: those of them that
    were encoded before. partial: the image
    that is encoded up to the layer partial_end only. num_inserted, inserted_s: tokens computed
    inside it, and how long that usually takes.
    """

    budget: int
    image_budget: int
    image_cost: ImageCost
    has_streams: bool = False
    batch: StepBatch = field(default_factory=StepBatch)
    sequences: list[Sequence] = field(default_factory=list)
    due_images: list[ImageEntry] = field(default_factory=list)
    loaded: list[ImageEntry] = field(default_factory=list)
    partial: ImageEntry | None = None
    partial_end: int = 0
    copies: dict[Sequence, BlockCopy] = field(default_factory=dict)
    quotas: dict[str, int] = field(default_factory=dict)
    num_inserted: int = 0
    inserted_s: float = 0.0

    @classmethod
    def of(cls, limits: SchedulerLimits, image_cost: ImageCost) -> Step:
        """A step of which nothing is planned."""
        return cls(limits.max_num_batched_tokens, limits.max_num_batched_images, image_cost)

    def room(self, owner: str) -> int:
        """How many more tokens this owner may use."""
        return min(self.budget, max(0, self.quotas.get(owner, self.budget)))

    def has_room(self, owner: str) -> bool:
        """True if this owner may use a token more."""
        return self.room(owner) > 0

    def spend(self, owner: str, num_tokens: int) -> None:
        """Use tokens of the budget, and of the owner's quota if it has one."""
        self.budget -= num_tokens
        if owner in self.quotas:
            self.quotas[owner] -= num_tokens

    def room_inside(self, limits: SchedulerLimits) -> int:
        """How many tokens a step may have that is computed inside this one.

        What this one leaves of the budget, at least a small part of it: between two layers it needs
        less memory.
        """
        return max(self.budget, limits.max_num_batched_tokens // INSERTED_PART)

    def has_time_inside(self, num_tokens: int, times: StepTimes) -> bool:
        """Whether a step of so many tokens may be computed inside this one.

        The first may. With the others, all of them take at most as long as this one by itself;
        where that was not measured, they have at most half of its tokens.
        """
        if not self.num_inserted:
            return True
        seconds, own_s = times.seconds(num_tokens), times.seconds(self.batch.num_tokens)
        if seconds is None or own_s is None:
            return self.num_inserted + num_tokens <= self.batch.num_tokens // 2
        return self.inserted_s + seconds <= own_s

    def count_inside(self, num_tokens: int, times: StepTimes) -> None:
        """Count a step that is computed inside this one."""
        self.num_inserted += num_tokens
        self.inserted_s += times.seconds(num_tokens) or 0.0

    def can_begin_image(self, owner: str) -> bool:
        """True if a new image, or a part of it, can be encoded in this step too."""
        return self._layers_within(self.image_cost.num_layers, self.room(owner)) > 0

    def encode(self, entry: ImageEntry, owner: str, tiles: TileStore[Sequence]) -> bool:
        """Plan as much of `entry` as fits; True if it is complete after this step.

        tiles: has its tiles, or what a former step encoded of them, which costs nothing.
        """
        if entry in self.due_images:
            return True
        if (data := tiles.stored(entry.key)) is not None:
            self.batch.loads[tuple(entry.block_ids)] = data
            self.loaded.append(entry)
            self.due_images.append(entry)
            return True
        total = self.image_cost.num_layers
        begin = entry.num_layers
        num_layers = self._layers_within(total - begin, self.room(owner))
        if num_layers == 0:
            return False
        end = begin + num_layers
        image, last = tiles.take(entry.key), None if end == total else end
        name = tiles.keep_as(entry.key) if last is None else ""
        self.batch.images.append(
            ImageToEncode(image, entry.block_ids, begin, last, entry.key.adapter, name)
        )
        self.image_budget -= 1
        if self.has_streams:
            self.spend(owner, min(self.budget, self.image_cost.of(num_layers)))
        if end < total:
            self.partial, self.partial_end = entry, end
            self.image_budget = 0
            return False
        self.due_images.append(entry)
        return True

    def plan_images(
        self, sequence: Sequence, start: int, end: int, tiles: TileStore[Sequence], owners: Owners
    ) -> int:
        """Encode the images that these positions see and no step has encoded.

        Returns where the chunk ends: before the first image that must wait for another step. That
        image may begin before `start` if the tokens up to there came from the prefix cache.
        """
        owner, num_planned = sequence.owner, len(self.batch.images)
        for entry, span in zip(sequence.images, sequence.request.spans, strict=True):
            is_due = not entry.is_encoded and is_seen(span, start, end)
            if is_due and not self.encode(entry, owner, tiles):
                end = max(span.start, start)
                break
        for image in self.batch.images[num_planned:]:
            total = self.image_cost.num_layers
            num_layers = (total if image.end is None else image.end) - image.begin
            owners.charge(owner, self.image_cost.of(num_layers))
        return end

    def share(self, owners: Owners, running: list[Sequence], queue: RequestQueue | None) -> None:
        """Give each owner its part of what is left, if owners want more than that.

        queue: of the sequences that may start in this step; None if none may.
        """
        if len(owners) < 2:
            return
        wanted: Counter[str] = Counter()
        image_tokens = self.image_cost.num_tokens if self.has_streams else 0
        for sequence in running:
            if not sequence.is_in_step:
                num_images = sum(not entry.is_encoded for entry in sequence.images)
                wanted[sequence.owner] += sequence.num_uncomputed_tokens + num_images * image_tokens
        for owner, line in queue.lines.items() if queue is not None else ():
            if line.ready:
                wanted[owner] += line.amounts.num_tokens + line.amounts.num_images * image_tokens
        used = Counter(sequence.owner for sequence in self.sequences)
        claims = {one: Claim(owners.weight(one), used[one], wanted[one]) for one in wanted}
        self.quotas = quotas_of(claims, self.budget)

    def record_images(
        self, part: ImageEntry | None, tiles: TileStore[Sequence]
    ) -> ImageEntry | None:
        """After the step: record how far its images are encoded.

        part: the image of which the runner had a part before the step. Returns the one of which it
        has a part now.
        """
        for entry in self.due_images:
            entry.is_encoded = True
            tiles.forget_encoded(entry.key)
        if part in self.due_images:
            part = None
        if self.partial is None:
            return part
        if part is not None:
            part.num_layers = 0  # the runner keeps only the newest part
        self.partial.num_layers = self.partial_end
        return self.partial

    def forget_images(self, part: ImageEntry | None) -> None:
        """After a failed step: its images, and the runner's `part` of one, are encoded again."""
        for entry in (part, self.partial, *self.due_images):
            if entry is not None:
                entry.num_layers = 0

    def share_vision(self, seconds: float) -> None:
        """Add the seconds that the step spent in the vision encoder to its images, equal parts."""
        encoded = [entry for entry in self.due_images if entry not in self.loaded]
        entries = [*encoded, *([] if self.partial is None else [self.partial])]
        for entry in entries:
            entry.vision_s += seconds / len(entries)

    def _layers_within(self, num_left: int, budget: int) -> int:
        """How many of an image's last `num_left` layers this step may compute for `budget`."""
        if self.image_budget == 0:
            return 0
        if not self.has_streams or self.image_cost.of(num_left) <= budget:
            return num_left
        # A part goes alone: the runner keeps only one partial image between steps.
        return 0 if self.batch.images else max(1, self.image_cost.layers_for(budget))


@dataclass(frozen=True, slots=True)
class Claim:
    """What one owner could use of a step: its weight, the tokens it has already, those it wants."""

    weight: float
    num_used: int
    num_wanted: int

    def at(self, level: float) -> int:
        """The tokens that bring the owner to `level` tokens per weight, at most those it wants."""
        return min(self.num_wanted, max(0, int(level * self.weight) - self.num_used))


def quotas_of(claims: dict[str, Claim], budget: int) -> dict[str, int]:
    """Each owner's part of the budget: max-min fair by weight; no quotas if all claims fit.

    What an owner uses for its running answers counts as its part. Each owner gets at least one
    token. Found by bisection, to less than one token for each owner.
    """
    if len(claims) < 2 or sum(claim.num_wanted for claim in claims.values()) <= budget:
        return {}
    low, high = 0.0, max((c.num_used + c.num_wanted + 1) / c.weight for c in claims.values())
    least = min(claim.weight for claim in claims.values())
    while (high - low) * least > 0.5 / len(claims):
        level = (low + high) / 2
        if sum(claim.at(level) for claim in claims.values()) <= budget:
            low = level
        else:
            high = level
    return {owner: max(1, claim.at(low)) for owner, claim in claims.items()}
