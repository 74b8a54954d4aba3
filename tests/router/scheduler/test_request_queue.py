"""The request queue: first in first out, bounded by count, tokens and bytes."""

from __future__ import annotations

import asyncio

import pytest
from support.fake_runner import fake_image

from vlmserve.models.batch import ImageSpan
from vlmserve.router.errors import QueueFullError, error_of, failure_of
from vlmserve.router.messages import AddRequest
from vlmserve.router.scheduler.request_queue import QueueLimits, RequestQueue
from vlmserve.router.scheduler.sequence import Sequence
from vlmserve.router.scheduler.throughput import WaitEstimator


def sequence_of(name: str, num_tokens: int = 3, num_images: int = 0, **fields) -> Sequence:
    request = AddRequest(
        request_id=name,
        prompt_token_ids=[1] * num_tokens,
        images=[fake_image("p")] * num_images,
        spans=[ImageSpan(0)] * num_images,
        max_tokens=1,
        **fields,
    )
    return Sequence(name, 0, request)


def queue_of(max_requests=10, max_tokens=100, max_bytes=100) -> RequestQueue:
    """A queue of an engine that computes two tokens a second, by a clock that stands."""
    estimator = WaitEstimator(clock=lambda: 5.0)
    estimator.record_step(started_at=0.0, num_tokens=10)
    return RequestQueue(QueueLimits(max_requests, max_tokens, max_bytes), estimator)


@pytest.mark.parametrize(
    ("queue", "what"),
    [
        (queue_of(max_requests=2), "3 requests would wait, the limit is 2"),
        (queue_of(max_tokens=8), "9 prompt tokens would wait, the limit is 8"),
        (queue_of(max_bytes=30), "36 image bytes would wait, the limit is 30"),
    ],
)
def test_a_full_queue_refuses_with_the_limit_and_when_to_come_back(queue, what):
    first = sequence_of("a", num_images=1)
    queue.put(first)
    queue.put(sequence_of("b", num_images=1))
    with pytest.raises(QueueFullError, match=what) as rejection:
        queue.put(sequence_of("c", num_images=1))
    assert rejection.value.retry_after_s == 3.0, "six tokens wait"
    assert len(queue) == 2
    queue.remove(first)
    queue.put(sequence_of("c", num_images=1))


def test_an_empty_queue_takes_a_request_that_is_larger_than_its_limits():
    queue = queue_of(max_tokens=5, max_bytes=5)
    queue.put(sequence_of("a", num_tokens=6, num_images=1))
    with pytest.raises(QueueFullError):
        queue.put(sequence_of("b", num_tokens=1))


def test_a_refusal_keeps_its_message_and_its_delay_over_the_wire():
    error = error_of(failure_of("a", QueueFullError("full", 3.0)))
    assert isinstance(error, QueueFullError)
    assert (str(error), error.retry_after_s) == ("full", 3.0)


def names_in_order(queue: RequestQueue) -> list[str]:
    order = []
    while (sequence := queue.peek()) is not None:
        order.append(sequence.sequence_id)
        queue.remove(sequence)
    assert queue.num_tokens == queue.num_bytes == len(queue) == 0
    return order


def test_requests_leave_in_order_and_preempted_ones_before_those_that_came_later():
    queue = queue_of()
    sequences = [sequence_of(name) for name in "abc"]
    for sequence in sequences:
        queue.put(sequence)
    for sequence in sequences[:2]:
        assert queue.peek() is sequence
        queue.remove(sequence)
    queue.put(sequence_of("d"))
    for sequence in sequences[:2]:
        queue.requeue(sequence)
    assert names_in_order(queue) == ["a", "b", "c", "d"]


def test_a_lower_priority_number_goes_first_and_equal_ones_by_arrival():
    queue = queue_of()
    for name, priority in [("a", 0), ("b", 5), ("c", -1), ("d", 0), ("e", -1)]:
        queue.put(sequence_of(name, priority=priority))
    assert names_in_order(queue) == ["c", "e", "a", "d", "b"]


def test_each_answer_that_is_asked_for_counts_as_a_request():
    queue = queue_of(max_requests=3)
    queue.put(sequence_of("a"))
    leader, _, _ = Sequence.of(0, sequence_of("b", choice_ids=["c", "d"]).request)
    with pytest.raises(QueueFullError, match="4 requests would wait"):
        queue.put(leader)
    queue.remove(queue.peek())
    queue.put(leader)
    with pytest.raises(QueueFullError, match="4 requests would wait"):
        queue.put(sequence_of("e"))


def test_the_time_to_come_back_follows_the_pace_of_the_last_seconds():
    now = 0.0
    estimator = WaitEstimator(clock=lambda: now)
    assert estimator.seconds_for(10**6) == 1.0, "nothing is known yet"
    for now in (1.0, 2.0, 3.0):
        estimator.record_step(now - 1, 100)
    assert estimator.seconds_for(1000) == 10.0
    assert (estimator.seconds_for(1), estimator.seconds_for(10**6)) == (1.0, 60.0)
    for now in (20.0, 21.0):
        estimator.record_step(now - 1, 10)
    assert estimator.seconds_for(100) == 10.0, "the fast steps are long ago"
    now = 31.0
    assert estimator.seconds_for(20) == 22.0, "two seconds' tokens took eleven until now"


def test_the_time_to_wait_follows_how_long_the_last_requests_ran():
    estimator = WaitEstimator()
    for _ in range(3):
        estimator.record_run(8.0)
    assert estimator.wait_s(1, 4) is None, "too few have ended to tell"
    estimator.record_run(8.0)
    assert (estimator.wait_s(1, 4), estimator.wait_s(6, 4)) == (2.0, 12.0)
    for _ in range(64):
        estimator.record_run(4.0)
    assert estimator.wait_s(1, 4) == 1.0, "the first ones are forgotten"


def test_those_of_a_better_or_equal_priority_are_ahead_of_a_newcomer():
    queue = queue_of()
    for name, priority in (("a", 0), ("b", 5), ("c", 1)):
        queue.put(sequence_of(name, priority=priority))
    assert [queue.position("", 1.0, priority) for priority in (-1, 0, 1, 5)] == [1, 2, 3, 4]


def test_a_preempted_sequence_is_taken_back_by_a_full_queue():
    queue = queue_of(max_requests=1)
    queue.put(sequence_of("a"))
    queue.requeue(sequence_of("b"))
    assert len(queue) == 2


def test_waiting_ends_when_a_request_comes_and_not_before():
    async def scenario() -> None:
        queue = queue_of()
        queue.put(sequence := sequence_of("a"))
        queue.remove(sequence)
        waiting = asyncio.create_task(queue.wait())
        await asyncio.sleep(0)
        assert not waiting.done()
        queue.put(sequence_of("b"))
        await asyncio.wait_for(waiting, 120)

    asyncio.run(scenario())
