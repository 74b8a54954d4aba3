"""The router's loads, whatever the order in which Ray reports what becomes of a request."""

import asyncio
from types import SimpleNamespace

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID
from ray.serve._private.request_router.common import PendingRequest

from vlmserve.server.ray import request_router
from vlmserve.server.ray.messages import ForwardedRequest
from vlmserve.server.ray.request_router import IS_READY, OPEN, AffinityRouter

DEPLOYMENT = DeploymentID(name="engine", app_name="vlmserve")


class Result:
    """An answer of a replica."""

    def __init__(self, has_ended=False):
        self._has_ended, self._callbacks = has_ended, []

    def add_done_callback(self, callback):
        if self._has_ended:
            callback(self)
        self._callbacks.append(callback)

    def end(self):
        for callback in self._callbacks:
            callback(self)


async def no_queue(**_):
    return 0


class Routing:
    """A router of three replicas, and the calls that Ray makes of it."""

    def __init__(self):
        self.router = AffinityRouter(DEPLOYMENT, DeploymentHandleSource.REPLICA)
        self.router.initialize_state()
        self.replicas = [
            SimpleNamespace(
                replica_id=ReplicaID(name, DEPLOYMENT), routing_stats={}, get_queue_len=no_queue
            )
            for name in ("a", "b", "c")
        ]

    async def choose(self, pending):
        ranks = await self.router.choose_replicas(self.replicas, pending)
        return ranks[0][0].replica_id

    async def take(self, result):
        """A request that a replica has taken: its name."""
        pending = request()
        replica = await self.choose(pending)
        pending.future.set_result(replica)
        self.router.on_request_routed(pending, replica, result)
        return replica.unique_id

    async def loads(self):
        # Callbacks of the loop's next turn.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return {name: load.now for name, load in self.router._chooser.loads.items()}

    def has_forgotten_all(self):
        return not self.router._chosen


def request(**fields):
    forwarded = ForwardedRequest("POST", b"/v1/completions", [], weight=1.5, sender="me", **fields)
    metadata = SimpleNamespace(internal_request_id="one")
    return PendingRequest(args=[forwarded], kwargs={}, metadata=metadata)


IDLE = {"a": 0, "b": 0, "c": 0}


@pytest.fixture
def routed():
    """routed(check): run `check(routing)` in a loop, with the replicas that Ray reported."""

    def run(check):
        async def main():
            routing = Routing()
            routing.router.update_replicas(routing.replicas)
            await check(routing)
            assert await routing.loads() == IDLE
            assert routing.has_forgotten_all()

        asyncio.run(main())

    return run


def test_a_request_counts_from_its_choice_to_the_end_of_its_answer(routed):
    async def check(routing):
        pending, result = request(), Result()
        replica = await routing.choose(pending)
        assert await routing.loads() == IDLE | {replica.unique_id: 1.5}
        pending.future.set_result(replica)
        routing.router.on_request_routed(pending, replica, result)
        assert await routing.loads() == IDLE | {replica.unique_id: 1.5}
        result.end()

    routed(check)


def test_an_answer_that_ends_before_ray_reports_its_start_leaves_no_load(routed):
    """It was subtracted before it was added, so that the replica seemed busy ever after."""

    async def check(routing):
        pending = request()
        replica = await routing.choose(pending)
        pending.future.set_result(replica)
        routing.router.on_request_completed(replica, pending.metadata.internal_request_id)
        routing.router.on_request_routed(pending, replica, Result(has_ended=True))

    routed(check)


def test_many_requests_at_once_are_spread(routed):
    """None counted until its replica had taken it: all went to the one with the least load."""

    async def check(routing):
        results = [Result(), Result()]
        busy = {await routing.take(result) for result in results}
        pending = [request() for _ in range(7)]
        chosen = [(await routing.choose(one)).unique_id for one in pending]
        assert sorted(chosen.count(name) for name in "abc") == [2, 2, 3]
        assert all(chosen.count(name) == 2 for name in busy)
        for one in pending:
            one.future.cancel()
        for result in results:
            result.end()

    routed(check)


def test_a_choice_that_comes_to_nothing_is_taken_back(routed):
    async def check(routing):
        cancelled, again = request(), request()
        await routing.choose(cancelled)
        cancelled.future.cancel()
        # Full or gone: Ray chooses again for the same request.
        replica = await routing.choose(again)
        again.future.set_result(replica)
        again.reset_future()
        await routing.choose(again)
        assert sum((await routing.loads()).values()) == 1.5
        again.future.cancel()

    routed(check)


def test_a_choice_of_which_ray_reports_nothing_more_counts_for_a_while_only(routed, monkeypatch):
    monkeypatch.setattr(request_router, "ACCEPT_TIMEOUT_S", 0)

    async def check(routing):
        pending = request()
        pending.future.set_result(await routing.choose(pending))

    routed(check)


def test_a_request_counts_where_it_went(routed):
    async def check(routing):
        pending, result = request(), Result()
        chosen = await routing.choose(pending)
        other = next(one.replica_id for one in routing.replicas if one.replica_id != chosen)
        pending.future.set_result(other)
        routing.router.on_request_routed(pending, other, result)
        assert await routing.loads() == IDLE | {other.unique_id: 1.5}
        result.end()

    routed(check)


def test_what_a_replica_had_before_it_was_gone_counts_no_more_when_it_is_back(routed):
    async def check(routing):
        result = Result()
        name = await routing.take(result)
        routing.router.update_replicas([one for one in routing.replicas
                                        if one.replica_id.unique_id != name])  # fmt: skip
        routing.router.update_replicas(routing.replicas)
        assert await routing.loads() == IDLE
        result.end()

    routed(check)


def test_a_report_counts_the_requests_of_others_and_excludes_what_is_not_ready(routed):
    async def check(routing):
        result = Result()
        await routing.take(result)
        result.end()
        first, second, third = routing.replicas
        first.routing_stats = {OPEN: {"me": 5, "other": 2}, IS_READY: True}
        second.routing_stats = {OPEN: {}, IS_READY: False}
        third.routing_stats = {OPEN: {"other": 1}, IS_READY: True}
        routing.router.update_replicas(routing.replicas)
        assert await routing.loads() == {"a": 2, "b": 0, "c": 1}
        assert await routing.take(result) == "c"
        result.end()
        for one in routing.replicas:
            one.routing_stats = {}
        routing.router.update_replicas(routing.replicas)

    routed(check)
