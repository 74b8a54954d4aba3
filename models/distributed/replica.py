"""The devices, threads and memory of one of several engines on a machine."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import torch

from ..settings.runner_config import RunnerConfig
from ..settings.threads import threads_of_one
from ..weights.device_choice import check_gpus, choose_device


@dataclass(slots=True, frozen=True)
class Replica:
    """Engine `number` of `count`, each on `size` devices."""

    number: int
    count: int
    size: int = 1

    def share_of(self, config: RunnerConfig) -> RunnerConfig:
        """The settings with this replica's devices, threads and share of the memory.

        Raises ModelError, one line, if there are too few GPUs.
        """
        device = self.device_of(choose_device(config.device))
        return msgspec.structs.replace(
            config,
            device=str(device),
            num_threads=config.num_threads or threads_of_one(self.count * self.size),
            num_sharers=self.count if device.type == "cpu" else 1,
        )

    def device_of(self, base: torch.device) -> torch.device:
        """The first of this replica's consecutive devices; the first replica's is `base`."""
        if base.type != "cuda":
            return base
        each = f" with --tensor-parallel-size {self.size}" if self.size > 1 else ""
        check_gpus(base, self.count * self.size, f"--replicas {self.count}{each}")
        return torch.device("cuda", (base.index or 0) + self.number * self.size)
