"""Ranks that are threads of this process; their collectives meet at a barrier."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


class Meeting:
    """Where threads that play ranks put what they computed and take what all did."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=60)
        self._given: list = [None] * size

    def leave(self) -> None:
        """Let nobody wait for a rank that failed."""
        self._barrier.abort()

    def exchange(self, rank: int, value):
        self._given[rank] = value
        self._barrier.wait()
        everything = list(self._given)
        self._barrier.wait()
        return everything


class ThreadGroup:
    """A rank's collectives, at the meeting."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.size, self._meeting = rank, meeting.size, meeting

    def add_up(self, states: Tensor) -> Tensor:
        return torch.stack(self._meeting.exchange(self.rank, states)).sum(0)

    def join(self, states: Tensor) -> Tensor:
        return torch.cat(self._meeting.exchange(self.rank, states), dim=-1)

    def has_loaded(self) -> None:
        pass

    def least(self, numbers: list[int]) -> list[int]:
        return [min(column) for column in zip(*self._meeting.exchange(self.rank, numbers))]  # noqa: B905


def on_ranks(size: int, work: Callable):
    """What `work(group)` gives on each rank, all at once."""
    meeting = Meeting(size)

    def run(rank: int):
        try:
            return work(ThreadGroup(rank, meeting))
        except BaseException:
            meeting.leave()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
        return [future.result() for future in futures]
