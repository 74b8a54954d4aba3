"""The lanes of one worker: work before and after the engine that its clients' keys share.

Owns which kinds of work have a lane, how many places each has, and how long work may wait. The
engine's own queue is in `router/`. Knows nothing of what the work is.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from .fair_lane import FairLane, LaneLimits

THREADS = "worker threads"
IMAGE_FETCHES = "image fetches"
NAME_LOOKUPS = "name lookups"
IMAGE_DECODERS = "image decoders"
GRAMMARS = "grammars"
LANE_NAMES = (THREADS, IMAGE_FETCHES, NAME_LOOKUPS, IMAGE_DECODERS, GRAMMARS)
# Places of which one key takes as many as are left free for others: work that mostly waits for
# another machine, and grammars, whose compiles take seconds and cannot be interrupted.
KEEP_ROOM = (IMAGE_FETCHES, NAME_LOOKUPS, GRAMMARS)


class Lanes:
    """Makes the worker's lanes. Each name has one lane.

    max_wait_s: --max-queue-wait, None for any time. on_refusal: called with a lane's name for each
    piece of work that it refuses. weight_of: the weight of a key, which its lanes are named by.
    """

    def __init__(
        self,
        max_wait_s: float | None = None,
        on_refusal: Callable[[str], None] = lambda name: None,
        weight_of: Callable[[str], float] = lambda key: 1.0,
    ) -> None:
        self._max_wait_s = max_wait_s
        self._on_refusal = on_refusal
        self._weight_of = weight_of

    def lane(self, name: str, num_places: int) -> FairLane:
        """A lane of so many places. name: one of LANE_NAMES."""
        assert name in LANE_NAMES, f"{name} is not a lane of the worker"
        limits = LaneLimits(num_places, max_wait_s=self._max_wait_s, keeps_room=name in KEEP_ROOM)
        return FairLane(name, limits, weight_of=self._weight_of, on_refusal=self._on_refusal)

    def threads(self) -> FairLane:
        """Long prompts and large bodies, which threads read: one for each core, at least two."""
        return self.lane(THREADS, max(2, len(os.sched_getaffinity(0))))
