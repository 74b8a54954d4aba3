"""Which running sequence loses its place and blocks when another needs them.

Owns the two choices: for a block that a running sequence lacks, and for an owner that waits while
another has far more places. Changes nothing; the scheduler preempts.

`running` is ordered by rank here; so are the sequences of each owner in it. One of them is
protected: of the first sequence of each owner, the one that came first. It is preempted only if it
is alone, so it ends in a bounded number of steps, and another one is protected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from .block_manager import Lack
from .owners import Owners
from .sequence import Sequence


def protected(running: list[Sequence]) -> Sequence:
    """The running sequence that always proceeds. `running` is not empty."""
    firsts: dict[str, Sequence] = {}
    for sequence in running:
        firsts.setdefault(sequence.owner, sequence)
    return min(firsts.values(), key=lambda one: (one.level, one.arrival, one.choice))


def victim(running: list[Sequence], owners: Owners) -> Sequence:
    """The sequence to preempt for a block: the last of the owner with most blocks by weight."""
    if len(owners.num_running) < 2:
        return running[-1]
    num_blocks: Counter[str] = Counter()
    for sequence in running:
        num_blocks[sequence.owner] += len(sequence.block_ids)
    lasts = _lasts(running, {protected(running)})
    return max(
        lasts.values(),
        key=lambda one: (one.level, num_blocks[one.owner] / owners.weight(one.owner), one.arrival),
        default=running[-1],
    )


def yielding(running: list[Sequence], head: Sequence, lack: Lack, owners: Owners) -> list[Sequence]:
    """The sequences to preempt so that the waiting `head` can start; empty if it has to wait.

    Only an owner with less than half of another's places, by weight, is let in, and only as long
    as it has no more than the other afterwards: so owners never take places from each other in
    turn. lack: what `head` lacks besides a place. An estimate: victims may share blocks.
    """
    victims: list[Sequence] = []
    kept = {protected(running)}
    num_places = Counter(owners.num_running)
    own = owners.places(head.owner)
    own_after = own + 1 / owners.weight(head.owner)
    while not victims or lack.is_left:
        lasts = _lasts(running, kept)
        lasts.pop(head.owner, None)
        allowed = [one for one in lasts.values() if one.level >= head.level]
        if not allowed:
            return []
        last = max(allowed, key=lambda one: num_places[one.owner] / owners.weight(one.owner))
        weight = owners.weight(last.owner)
        has_far_more = 2 * own < num_places[last.owner] / weight
        if not has_far_more or own_after > (num_places[last.owner] - 1) / weight:
            return []
        victims.append(last)
        kept.add(last)
        num_places[last.owner] -= 1
        lack = lack.after(last)
    return victims


def has_far_less(owner: str, owners: Owners) -> bool:
    """True if `owner` has less than half of the places of another owner, by weight."""
    own = owners.places(owner)
    return any(2 * own < owners.places(other) for other in owners.num_running if other != owner)


def _lasts(running: list[Sequence], kept: Iterable[Sequence]) -> dict[str, Sequence]:
    """The last sequence of each owner that is not in `kept`."""
    lasts: dict[str, Sequence] = {}
    for sequence in reversed(running):
        if sequence not in kept:
            lasts.setdefault(sequence.owner, sequence)
    return lasts
