"""The ranks' collectives, over torch.distributed.

Ranks are processes on one machine. They find each other by a file in memory, communicate over the
loopback interface (gloo) or the GPUs' links (NCCL), and listen on no other address.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

# until every rank has loaded its weights, which takes long from a slow disk
LOADING_TIMEOUT = timedelta(hours=1)
# afterwards: a rank may compile kernels while the others wait, which takes seconds
SERVING_TIMEOUT = timedelta(minutes=2)


class MeetingPlace:
    """A file in memory by which ranks find each other; it exists as long as its process.

    Close it after the group: a thread of NCCL polls the file, and waits up to
    LOADING_TIMEOUT if it is missing, which delays `DistributedGroup.close`.
    """

    def __init__(self) -> None:
        self._fd = os.memfd_create("vlmserve-ranks")

    @property
    def path(self) -> Path:
        """The path for this user's other processes."""
        return Path(f"/proc/{os.getpid()}/fd/{self._fd}")

    def close(self) -> None:
        """Delete the file; call it after closing the group."""
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
    def has_loaded(self) -> None: ...


class DistributedGroup:
    """Ranks in separate processes; one group for each process."""

    def __init__(self, rank: int, size: int, device: torch.device, meeting_place: Path) -> None:
        """Wait until all ranks have joined. meeting_place: a file that no other group uses."""
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        os.environ["NCCL_SOCKET_IFNAME"] = "lo"
        is_cuda = device.type == "cuda"
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            store=dist.FileStore(str(meeting_place), size),
            rank=rank,
            world_size=size,
            timeout=LOADING_TIMEOUT,
            device_id=device if is_cuda else None,
        )
        self.rank, self.size, self.device = rank, size, device

    def add_up(self, states: Tensor) -> Tensor:
        """The sum over the ranks, in place; bitwise equal on all ranks."""
        dist.all_reduce(states)
        return states

    def join(self, states: Tensor) -> Tensor:
        """Join [..., n] of each rank to [..., size * n], in the ranks' order."""
        parts = [torch.empty_like(states) for _ in range(self.size)]
        dist.all_gather(parts, states.contiguous())
        return torch.cat(parts, dim=-1)

    def least(self, numbers: list[int]) -> list[int]:
        """The least of each number over the ranks."""
        least = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return [int(number) for number in least.tolist()]

    def has_loaded(self) -> None:
        """Wait until every rank has loaded its weights, and less for the others from then on.

        A rank whose GPU hangs then ends the group soon.
        """
        self.least([0])
        _set_pg_timeout(SERVING_TIMEOUT)

    def close(self) -> None:
        """Leave the group; this process may join another group afterwards."""
        dist.destroy_process_group()
