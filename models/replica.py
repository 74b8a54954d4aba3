"""What one of several engines on this machine takes of it: GPUs of its own, or a share of the CPU.

Owns the arithmetic. Knows nothing of how models are loaded or of who starts engines.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .errors import ModelError
from .loading import choose_device


@dataclass(slots=True, frozen=True)
class Replica:
    """The engine of that number of `count`, each over `size` devices."""

    number: int
    count: int
    size: int = 1

    def share_of(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of `create_runner` with this replica's devices, threads and memory.

        Raises ModelError, one line, where there are too few GPUs.
        """
        device = self.device_of(choose_device(options["device"]))
        return {
            **options,
            "device": str(device),
            "num_threads": options["num_threads"] or self._num_threads(),
            "num_sharers": self.count if device.type == "cpu" else 1,
        }

    def device_of(self, base: torch.device) -> torch.device:
        """The first of this replica's devices; they lie one behind the other from `base` on."""
        if base.type != "cuda":
            return base
        first = base.index or 0
        left = torch.cuda.device_count() - first
        if left < self.count * self.size:
            each = f" with --tensor-parallel-size {self.size}" if self.size > 1 else ""
            raise ModelError(
                f"--replicas {self.count}{each} needs {self.count * self.size} CUDA devices and "
                f"there are {left} from {base} on"
            )
        return torch.device("cuda", first + self.number * self.size)

    def _num_threads(self) -> int | None:
        """Threads of one process; None where OMP_NUM_THREADS says so already."""
        if "OMP_NUM_THREADS" in os.environ:
            return None
        return max(1, len(os.sched_getaffinity(0)) // (self.count * self.size))
