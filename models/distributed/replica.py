"""What one of several engines on this machine takes of it: GPUs of its own, or a share of the CPU.

Owns the arithmetic. Knows nothing of how models are loaded or of who starts engines.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import torch

from ..settings.runner_config import RunnerConfig
from ..threads import threads_of_one
from ..weights.loader import check_gpus, choose_device


@dataclass(slots=True, frozen=True)
class Replica:
    """The engine of that number of `count`, each over `size` devices."""

    number: int
    count: int
    size: int = 1

    def share_of(self, config: RunnerConfig) -> RunnerConfig:
        """The settings with this replica's devices, threads and share of the memory.

        Raises ModelError, one line, where there are too few GPUs.
        """
        device = self.device_of(choose_device(config.device))
        return msgspec.structs.replace(
            config,
            device=str(device),
            num_threads=config.num_threads or threads_of_one(self.count * self.size),
            num_sharers=self.count if device.type == "cpu" else 1,
        )

    def device_of(self, base: torch.device) -> torch.device:
        """The first of this replica's devices; they lie one behind the other from `base` on."""
        if base.type != "cuda":
            return base
        each = f" with --tensor-parallel-size {self.size}" if self.size > 1 else ""
        check_gpus(base, self.count * self.size, f"--replicas {self.count}{each}")
        return torch.device("cuda", (base.index or 0) + self.number * self.size)
