"""Ray Serve's router of requests to engines: where a request's pictures and prefix are.

The choice is `ReplicaChooser`'s, as among the engines of `--replicas`. Ray creates one router in
each process that calls the engines; they learn of each other's requests by the replicas' reports.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from ...router.client.replica_chooser import Load, ReplicaChooser, margin_of
from .messages import ACCEPT_TIMEOUT_S, ForwardedRequest

# A replica's report: whether its server is ready, and its open requests by their sender.
IS_READY, OPEN = "is_ready", "open"


class AffinityRouter(RequestRouter):
    """Prefers the replica that knows a request's picture or prefix, within a bound of load.

    A request counts from its choice, so that many at once do not all find the same replica idle,
    until its answer ends. Ray may report the end of a short answer before it reports that the
    replica took it, and reports no end where a request is cancelled in between: so the end is
    taken from the result, and a choice that comes to nothing counts for ACCEPT_TIMEOUT_S at most.
    """

    def initialize_state(self, max_num_seqs: int = 64) -> None:
        """Called by Ray with the settings of `request_router_kwargs`."""
        self._margin = margin_of(max_num_seqs)
        self._chooser: ReplicaChooser[str] = ReplicaChooser(has_homes=True)
        self._sender = ""
        # By the identity of Ray's request: what no replica has taken yet.
        self._chosen: dict[int, _Part] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Ray when replicas start or end, and with their new reports."""
        super().update_replicas(replicas)
        self._chooser.update(replica.replica_id.unique_id for replica in replicas)
        for replica in replicas:
            counts: dict[str, int] = _report_of(replica).get(OPEN, {})
            others = sum(count for sender, count in counts.items() if sender != self._sender)
            self._chooser.loads[replica.replica_id.unique_id].report_others(others)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The chosen replica first, then the others, should it be full."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        request: ForwardedRequest = pending_request.args[0]
        self._sender = request.sender
        by_name = {one.replica_id.unique_id: one for one in candidate_replicas}
        able = self._able(by_name, request)
        self._forget(pending_request)
        chosen = self._chooser.choose(request.keys, able, self._margin)
        if chosen is None:
            return []
        self._count(pending_request, chosen)
        others = [by_name[name] for name in able if name != chosen]
        return [[by_name[chosen]], others]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Called by Ray when a replica has taken a request; its answer may have ended already."""
        self._forget(pending_request)
        request: ForwardedRequest = pending_request.args[0]
        replica = replica_id.unique_id
        load = self._chooser.loads.get(replica)
        if load is None:
            return
        self._chooser.affinities.record(request.keys, replica)
        part = _Part(load, request.weight)
        loop = asyncio.get_running_loop()
        # Called in a thread of Ray's; at once if the answer has ended.
        result.add_done_callback(lambda _: loop.call_soon_threadsafe(part.end))

    def _count(self, pending_request: PendingRequest, replica: str) -> None:
        """Add a request to the load of the replica that it will be sent to."""
        if pending_request.future.done():
            return
        request: ForwardedRequest = pending_request.args[0]
        key, part = id(pending_request), _Part(self._chooser.loads[replica], request.weight)

        def forget() -> None:
            part.end()
            if self._chosen.get(key) is part:
                del self._chosen[key]

        self._chosen[key] = part
        part.timer = asyncio.get_running_loop().call_later(ACCEPT_TIMEOUT_S, forget)
        pending_request.future.add_done_callback(lambda it: forget() if it.cancelled() else None)

    def _forget(self, pending_request: PendingRequest) -> None:
        """Take back what the last choice for a request added."""
        if (part := self._chosen.pop(id(pending_request), None)) is not None:
            part.end()

    def _able(self, replicas: dict[str, RunningReplica], request: ForwardedRequest) -> list[str]:
        """The ready replicas that were not tried; without any, the others."""
        if request.only is not None:
            return [request.only] if request.only in replicas else list(replicas)
        untried = [name for name in replicas if name not in request.tried] or list(replicas)
        ready = [name for name in untried if _report_of(replicas[name]).get(IS_READY, True)]
        return ready or untried


@dataclass(slots=True)
class _Part:
    """A request's part of a replica's load. timer: what ends it if nothing else does."""

    load: Load | None
    weight: float
    timer: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        assert self.load is not None
        self.load.own += self.weight
        self.load.own_answers += 1

    def end(self) -> None:
        """Take it back; once."""
        if self.load is not None:
            self.load.own -= self.weight
            self.load.own_answers -= 1
            self.load = None
        if self.timer is not None:
            self.timer.cancel()


def _report_of(replica: RunningReplica) -> dict[str, Any]:
    return replica.routing_stats or {}
