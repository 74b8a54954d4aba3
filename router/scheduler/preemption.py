"""Which running sequence yields its place, its blocks or a step when another needs them.

Owns the three choices: for a block that a running sequence lacks, for an owner that waits while
another has far more places, and for the prompt of an owner that runs nothing. Changes nothing; the
scheduler preempts and plans.

`running` is ordered by rank here; so are the sequences of each owner in it. One of them is
protected: of the first sequence of each owner, the one that came first. It is preempted only if it
is alone, so it ends in a bounded number of steps, and another one is protected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from .block_manager import NO_LACK, BlockManager, Lack
from .owners import Owners
from .request_queue import RequestQueue
from .sequence import Sequence
from .step_budget import Step
from .throughput import StepTimes

# A sequence to start, and the cached blocks of its beginning.
Start = tuple[Sequence, list[int]]


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
        key=lambda one: (
            one.level,
            owners.by_weight(one.owner, num_blocks[one.owner]),
            one.arrival,
        ),
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
    num_places = Counter(one.owner for one in running)
    own = owners.by_weight(head.owner, num_places[head.owner])
    own_after = own + owners.by_weight(head.owner, 1)
    while not victims or lack.is_left:
        lasts = _lasts(running, kept)
        lasts.pop(head.owner, None)
        allowed = [one for one in lasts.values() if one.level >= head.level]
        if not allowed:
            return []
        last = max(allowed, key=lambda one: owners.by_weight(one.owner, num_places[one.owner]))
        has_far_more = 2 * own < owners.by_weight(last.owner, num_places[last.owner])
        if not has_far_more or own_after > owners.by_weight(last.owner, num_places[last.owner] - 1):
            return []
        victims.append(last)
        kept.add(last)
        num_places[last.owner] -= 1
        lack = lack.after(last)
    return victims


def surplus(running: list[Sequence], owners: Owners) -> Sequence:
    """The sequence to preempt because one too many runs: the last of the owner with most places."""
    lasts = _lasts(running, {protected(running)})
    places = Counter(one.owner for one in running)
    return max(
        lasts.values(),
        key=lambda one: (one.level, owners.by_weight(one.owner, places[one.owner]), one.arrival),
    )


def may_add(running: list[Sequence], head: Sequence, max_num_seqs: int, owners: Owners) -> bool:
    """Whether `head` may start at once and take its place when the next step is planned.

    A place is free, or a sequence will yield it that yields to nothing else that was added.
    """
    kept = list(running)
    while len(kept) > max_num_seqs:
        kept.remove(surplus(kept, owners))
    return len(kept) < max_num_seqs or bool(yielding(kept, head, NO_LACK, owners))


def newcomer(
    queue: RequestQueue,
    running: list[Sequence],
    blocks: BlockManager,
    times: StepTimes,
    budget: int,
    num_others: int,
    *,
    inside: Step | None = None,
) -> Start | None:
    """The next waiting sequence, if its prompt is computed alone: in the next step, or inside one.

    With it the cached blocks of its beginning. Its owner runs nothing while others run. The whole
    prompt fits `budget` tokens, its images are encoded, and the step takes at most 3/4 as long as
    one that has the `num_others` tokens of the others too. At most every second step is such a
    step, so the others lose less than half of their time. Where a step with many decodes takes
    long, as on a CPU, a short prompt in it would wait as long. inside: it is computed inside this
    step of the others, on a CPU. Then a step of a size that was not measured counts as long if it
    has many times the tokens; and log-probabilities of a prompt take memory that was not planned.
    """
    head = queue.peek() if len(queue.owners) > 1 else None
    if inside is not None and head is not None:
        head = _idle_head(queue, head, num_others)
    if head is None or queue.owners.num_running[head.owner] or not blocks.has_images(head):
        return None
    if inside is not None and head.prompt_logprobs is not None:
        return None
    shared = blocks.cached_blocks(head, 0)
    num_new = blocks.num_uncached(head, shared)
    is_due = (
        num_others > 0
        and num_new <= budget
        and blocks.can_start(head, shared, num_spare=2 * len(running))
        and (inside is None or inside.has_time_inside(num_new, times))
        and (
            times.is_shorter(num_new, num_new + num_others)
            or (inside is not None and times.is_certainly_shorter(num_new, num_others))
        )
    )
    return (head, shared) if is_due else None


def _idle_head(queue: RequestQueue, head: Sequence, num_ahead: int) -> Sequence | None:
    """The head of an owner that runs nothing and is at most so many tokens ahead of its turn.

    `head`: the sequence whose turn it is. One short prompt puts an owner behind a flood that waits.
    """
    owners = queue.owners
    most = owners.used(head.owner) + num_ahead
    idle = queue.peek(lambda owner: not owners.num_running[owner] and owners.used(owner) <= most)
    return None if idle is None or idle.level > head.level else idle


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
