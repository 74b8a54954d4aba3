"""Several engines with the interface of one: `generate` sends each request to one of them.

Owns which clients may be chosen, and the retry of a request after a full queue or a dead engine.
Knows nothing of HTTP or tensors; `replica_chooser.py` chooses.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from ...models.batch import AdapterInfo, AdapterRef
from ..errors import EngineDeadError, QueueFullError
from ..messages import AddRequest, EngineReady, EngineStats, SequenceOutput
from ..scheduler.admission import check_image_blocks
from .engine_client import EngineClient, HealthThresholds
from .replica_chooser import ReplicaChooser, affinity_keys, margin_of, weight_of

# Why a request was retried on another replica: the first replica's queue was full, or it died
# before it started the request.
MoveReason = Literal["full", "dead"]
MOVE_REASONS: tuple[MoveReason, ...] = ("full", "dead")


# What all engines report alike.
_SHARED = ("block_size", "image_host_bytes")
_NOT_SUMS = (*_SHARED, "vision_step_counts", "running_adapters", "waiting_adapters")


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """One replica at this moment. All counts are 0 if it is not connected."""

    is_ready: bool
    stats: EngineStats


class ReplicaPool:
    """The engines of one worker, used like one `EngineClient`. The caller connects the clients.

    on_moved: called for every request that is retried on another replica. on_chosen: called with
    the number of each replica that gets a request, in the request's task. first: see
    `ReplicaChooser`.
    """

    def __init__(
        self,
        clients: Sequence[EngineClient],
        limits: HealthThresholds,
        on_moved: Callable[[MoveReason], None] = lambda reason: None,
        on_chosen: Callable[[int], None] = lambda replica: None,
        *,
        first: int = 0,
    ) -> None:
        self._clients = list(clients)
        self._limits = limits
        self._on_moved = on_moved
        self._on_chosen = on_chosen
        self.chooser = ReplicaChooser(range(len(clients)), first=first)
        self._infos: list[EngineReady | None] = [None] * len(clients)
        self._heartbeats_read: list[float | None] = [None] * len(clients)
        self._homes: dict[str, EngineClient] = {}
        self._least: EngineReady | None = None
        self._is_stopping = False

    @property
    def num_open_requests(self) -> int:
        return len(self._homes)

    # As one engine

    @property
    def is_ready(self) -> bool:
        """At least one replica has loaded its model."""
        return any(client.is_ready for client in self._clients)

    @property
    def info(self) -> EngineReady | None:
        """The smallest value of each field over the replicas that have ever been ready.

        One request runs on one replica, so sums would promise more than any replica can do.
        """
        infos = [client.info for client in self._clients]
        is_new = any(
            info is not None and info is not known
            for info, known in zip(infos, self._infos, strict=True)
        )
        if is_new:
            self._infos = [new or known for new, known in zip(infos, self._infos, strict=True)]
            self._least = least_of([info for info in self._infos if info is not None])
        return self._least

    @property
    def stats(self) -> EngineStats:
        """The sums over all replicas."""
        return sum_of([state.stats for state in self.states()])

    @property
    def heartbeat_age_s(self) -> float:
        """Of the healthiest replica, as are `stall_s` and `may_compile`."""
        return self._best.heartbeat_age_s

    @property
    def stall_s(self) -> float:
        return self._best.stall_s

    @property
    def may_compile(self) -> bool:
        return self._best.may_compile

    def states(self) -> list[ReplicaState]:
        """Each replica's own state."""
        return [ReplicaState(self._limits.allow(client), client.stats) for client in self._clients]

    async def generate(self, *requests: AddRequest) -> AsyncGenerator[SequenceOutput, None]:
        """As `EngineClient.generate`, by one replica.

        If its queue is full, the others are tried; QueueFullError is raised if all queues are
        full. If it dies before it started the request, the request is retried once on another. A
        request that had started may be why the replica died: it fails.
        """
        self._check_images(requests)
        keys = affinity_keys(requests[0])
        tried: set[int] = set()
        rejections: list[QueueFullError] = []
        has_lost_one = False
        while (replica := self._choose(keys, tried)) is not None:
            has_output = False
            self._on_chosen(replica)
            try:
                async with contextlib.aclosing(self._ask(replica, requests)) as outputs:
                    async for output in outputs:
                        has_output = True
                        yield output
                return
            except QueueFullError as error:
                if has_output:
                    raise
                rejections.append(error)
                reason: MoveReason = "full"
            except EngineDeadError as error:
                if has_output or error.has_started or has_lost_one:
                    raise
                has_lost_one, reason = True, "dead"
            tried.add(replica)
            if self._able(tried):
                self._on_moved(reason)
        if rejections:
            # The queue that has space again first.
            raise min(rejections, key=lambda error: error.retry_after_s)
        raise EngineDeadError("no replica is ready")

    def rejection(self, owner: str, priority: int) -> QueueFullError | None:
        """As `EngineClient.rejection`: an error only if every usable replica would reject."""
        able = self._able(set())
        rejections = [self._clients[number].rejection(owner, priority) for number in able]
        known = [error for error in rejections if error is not None]
        if not known or len(known) < len(rejections):
            return None
        return min(known, key=lambda error: error.retry_after_s)

    async def load_adapter(self, adapter: AdapterRef) -> AdapterInfo:
        """Have every ready replica read an adapter; the others read it when a request names it.

        Raises AdapterUnusableError, or EngineDeadError if no replica is ready.
        """
        calls = (one.load_adapter(adapter) for one in self._clients if one.is_ready)
        results = await asyncio.gather(*calls, return_exceptions=True)
        infos = [one for one in results if isinstance(one, AdapterInfo)]
        errors = [one for one in results if isinstance(one, BaseException)]
        lost = [one for one in errors if isinstance(one, EngineDeadError)]
        for error in errors:
            if error not in lost or not infos:
                raise error
        if not infos:
            raise EngineDeadError("no replica is ready")
        return infos[0]

    async def unload_adapter(self, digest: str) -> None:
        """Return when no replica has an open request with this adapter."""
        calls = (one.unload_adapter(digest) for one in self._clients if one.is_ready)
        for error in await asyncio.gather(*calls, return_exceptions=True):
            # A replica that died has forgotten it too.
            if isinstance(error, BaseException) and not isinstance(error, EngineDeadError):
                raise error

    def leave(self, request_id: str) -> None:
        """As `EngineClient.leave`."""
        client = self._homes.get(request_id)
        if client is not None:
            client.leave(request_id)

    def died(self, replica: int) -> None:
        """This replica's connection is lost: forget what it had cached."""
        self._heartbeats_read[replica] = None
        self.chooser.died(replica)

    def stop(self) -> None:
        """Send no more requests: none is retried on another replica."""
        self._is_stopping = True

    # Choosing

    def _choose(self, keys: Sequence[bytes], tried: set[int]) -> int | None:
        self._read_heartbeats()
        info = self.info
        margin = 0.0 if info is None else margin_of(info.max_num_seqs)
        return self.chooser.choose(keys, self._able(tried), margin)

    def _able(self, tried: set[int]) -> list[int]:
        """The healthy replicas that were not tried; without any, the ready ones."""
        if self._is_stopping:
            return []
        ready = [
            number
            for number, client in enumerate(self._clients)
            if client.is_ready and number not in tried
        ]
        healthy = [number for number in ready if self._limits.allow(self._clients[number])]
        return healthy or ready

    def _read_heartbeats(self) -> None:
        """Update loads from heartbeats since the last call."""
        for number, client in enumerate(self._clients):
            if client.last_heartbeat != self._heartbeats_read[number]:
                self._heartbeats_read[number] = client.last_heartbeat
                stats = client.stats
                self.chooser.loads[number].report(stats.num_running + stats.num_waiting)

    @property
    def _best(self) -> EngineClient:
        """The replica whose health counts for all: a healthy one, or else a ready one."""
        return max(self._clients, key=lambda client: (self._limits.allow(client), client.is_ready))

    # Sending

    async def _ask(
        self, replica: int, requests: Sequence[AddRequest]
    ) -> AsyncGenerator[SequenceOutput, None]:
        """One replica's outputs. The requests count as its load until they end."""
        client, load = self._clients[replica], self.chooser.loads[replica]
        ids = [answer_id for request in requests for answer_id in request.answer_ids]
        # A prompt counts until its first output; then only its answers count.
        prompts = sum(map(weight_of, requests)) - len(ids)
        load.own += len(ids) + prompts
        load.own_answers += len(ids)
        self._homes |= dict.fromkeys(ids, client)
        try:
            async with contextlib.aclosing(client.generate(*requests)) as outputs:
                async for output in outputs:
                    load.own -= prompts
                    prompts = 0.0
                    yield output
        finally:
            load.own -= len(ids) + prompts
            load.own_answers -= len(ids)
            for answer_id in ids:
                self._homes.pop(answer_id, None)

    def _check_images(self, requests: Sequence[AddRequest]) -> None:
        """Reject what the smallest replica cannot take, so that the choice does not matter."""
        if (info := self.info) is not None:
            for request in requests:
                check_image_blocks(request, info.num_image_tiles)


def least_of(infos: Sequence[EngineReady]) -> EngineReady:
    """The smallest value of each limit."""
    return msgspec.structs.replace(
        infos[0],
        max_model_len=min(info.max_model_len for info in infos),
        max_num_seqs=min(info.max_num_seqs for info in infos),
        num_text_tokens=min(info.num_text_tokens for info in infos),
        num_image_tiles=min(info.num_image_tiles for info in infos),
    )


def sum_of(all_stats: Sequence[EngineStats]) -> EngineStats:
    """The counts of several engines added up, for each bucket of vision_step_counts too."""
    total = EngineStats()
    for stats in all_stats:
        for name in EngineStats.__struct_fields__:
            if name not in _NOT_SUMS:
                setattr(total, name, getattr(total, name) + getattr(stats, name))
    for name in _SHARED:
        setattr(total, name, max((getattr(stats, name) for stats in all_stats), default=0))
    running = sum((Counter(stats.running_adapters) for stats in all_stats), Counter[str]())
    waiting = sum((Counter(stats.waiting_adapters) for stats in all_stats), Counter[str]())
    total.running_adapters, total.waiting_adapters = dict(running), dict(waiting)
    counts = [stats.vision_step_counts for stats in all_stats if stats.vision_step_counts]
    total.vision_step_counts = [sum(column) for column in zip(*counts, strict=True)]
    return total
