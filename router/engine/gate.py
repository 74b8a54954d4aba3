"""Which requests wait for a place: limits of an API key, and of the time in the queue.

Owns the rejections that depend on what runs and waits now. `scheduler/admission.py` rejects what
can never run, and the queue itself what it has no room for.
"""

from __future__ import annotations

from collections.abc import Callable

from ..config import EngineConfig
from ..errors import InvalidRequestError, QueueFullError, TooManyRequestsError
from ..messages import AddRequest, Rejection
from ..scheduler.request_queue import RequestQueue
from ..scheduler.throughput import LONGEST_S, SHORTEST_S, WaitEstimator


class Gate:
    """Rejects requests that may not wait. num_running: how many sequences run now."""

    def __init__(
        self,
        queue: RequestQueue,
        wait_estimator: WaitEstimator,
        config: EngineConfig,
        num_running: Callable[[], int],
    ) -> None:
        self._queue = queue
        self._wait_estimator = wait_estimator
        self._num_places = config.max_num_seqs
        self._max_wait_s = config.max_queue_wait_s
        self._num_running = num_running

    def check(self, request: AddRequest) -> None:
        """Raises InvalidRequestError, TooManyRequestsError or QueueFullError."""
        self._reject_beyond_policy(request)
        self._reject_long_wait(request.owner, request.policy.weight, request.priority)

    def rejections(self) -> list[Rejection]:
        """The errors that new requests would get now, so that workers need not send them."""
        errors = ((owner, self._rejection_of(owner)) for owner in self._queue.lines)
        return [
            Rejection(owner=owner, message=str(error), retry_after_s=error.retry_after_s)
            for owner, error in errors
            if error is not None
        ]

    def _reject_beyond_policy(self, request: AddRequest) -> None:
        """Raises TooManyRequestsError if the owner has as many answers as it may have at once."""
        limit, num_more = request.policy.max_concurrent, len(request.answer_ids)
        if limit is None:
            return
        if num_more > limit:
            raise InvalidRequestError(
                f"the request asks for {num_more} answers, and this API key may have {limit} at "
                "once: ask for fewer"
            )
        num_open = self._queue.owners.num_open(request.owner)
        if num_open + num_more > limit:
            raise TooManyRequestsError(
                f"this API key has {num_open} answers in progress and may have {limit} at once: "
                "wait until one of them has ended"
            )

    def _reject_long_wait(self, owner: str, weight: float, priority: int) -> None:
        """Raises QueueFullError if a new request of this owner would wait longer than the limit."""
        limit_s = self._max_wait_s
        if limit_s is None:
            return
        num_free = self._num_places - self._num_running()
        position = self._queue.position(owner, weight, priority) - num_free
        if position <= 0:
            return
        wait_s = self._wait_estimator.wait_s(position, self._num_places)
        if wait_s is not None and wait_s > limit_s:
            raise QueueFullError(
                f"the request would wait about {wait_s:.1f} s before it starts, the limit is "
                f"{limit_s:g} s. Try again later or start the server with a larger "
                "--max-queue-wait",
                min(max(wait_s - limit_s, SHORTEST_S), LONGEST_S),
            )

    def _rejection_of(self, owner: str) -> QueueFullError | None:
        """The error that any new request of a waiting owner would get."""
        weight = self._queue.owners.weight(owner)
        try:
            self._reject_long_wait(owner, weight, 0)
            # A free place in the batch is about to be taken by a waiting request.
            if self._num_running() == self._num_places:
                self._queue.reject_if_full(owner, weight)
        except QueueFullError as error:
            return error
        return None
