"""The ranks' collectives, over torch.distributed.

Owns how ranks find each other and the three things they do together. Knows nothing of models.

Ranks are processes of one machine: they meet by a file in memory, talk over the loopback interface
(gloo) or over the GPUs' own links (NCCL), and listen on no other address.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# the first collective waits for every rank to have loaded its weights
TIMEOUT = timedelta(hours=1)


class MeetingPlace:
    """A file in memory by which ranks find each other; it goes with the process that made it.

    It has to stay as long as the group: a thread of NCCL's asks it again and again, and would wait
    for a file that is gone, up to TIMEOUT, which `DistributedGroup.close` then waits for.
    """

    def __init__(self) -> None:
        self._fd = os.memfd_create("vlmserve-ranks")

    @property
    def path(self) -> Path:
        """Where this user's other processes find it."""
        return Path(f"/proc/{os.getpid()}/fd/{self._fd}")

    def close(self) -> None:
        """Let it go; call it after the group."""
        os.close(self._fd)


class Group(Protocol):
    """The ranks that share a model; every rank must make the same calls in the same order."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def add_up(self, states: Tensor) -> Tensor: ...
    def join(self, states: Tensor) -> Tensor: ...
    def least(self, numbers: list[int]) -> list[int]: ...


class DistributedGroup:
    """Ranks in processes of their own; one group a process."""

    def __init__(self, rank: int, size: int, device: torch.device, meeting_place: Path) -> None:
        """Waits until all ranks are there. meeting_place: a file that no other group uses."""
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        os.environ["NCCL_SOCKET_IFNAME"] = "lo"
        is_cuda = device.type == "cuda"
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            store=dist.FileStore(str(meeting_place), size),
            rank=rank,
            world_size=size,
            timeout=TIMEOUT,
            device_id=device if is_cuda else None,
        )
        self._rank, self._size, self.device = rank, size, device

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    def add_up(self, states: Tensor) -> Tensor:
        """The sum over the ranks, in place; the same bits on each."""
        dist.all_reduce(states)
        return states

    def join(self, states: Tensor) -> Tensor:
        """[..., n] of each rank as [..., size * n], in the ranks' order."""
        parts = [torch.empty_like(states) for _ in range(self._size)]
        dist.all_gather(parts, states.contiguous())
        return torch.cat(parts, dim=-1)

    def least(self, numbers: list[int]) -> list[int]:
        """The least of each number over the ranks."""
        least = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return [int(number) for number in least.tolist()]

    def close(self) -> None:
        """Leave the group; this process may make another then."""
        dist.destroy_process_group()
