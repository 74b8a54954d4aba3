"""Records a computation over fixed memory and replays it, by CUDA graphs.

A replay reads and writes the same memory each time, and uses the numbers that Python passed to the
kernels while it was recorded. So everything that changes must come from tensors.
"""

from __future__ import annotations

import contextlib
import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Computation = Callable[[], Tensor]

# passes before a capture: they compile kernels and allocate the libraries' workspaces
NUM_WARM_UPS = 2


@contextlib.contextmanager
def frozen_objects() -> Iterator[None]:
    """Exclude all existing objects from garbage collection, within the context.

    torch collects garbage before every capture; with many objects that takes as long as a capture.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Recorder(ABC):
    """Records computations on one device."""

    @abstractmethod
    def record(self, compute: Computation) -> Computation:
        """A function that replays `compute` and returns the same tensor each time.

        Any later replay, also of another computation, may overwrite that tensor. The caller must
        keep alive everything that `compute` reads.
        """


class CudaRecorder(Recorder):
    """Captures CUDA graphs on a separate stream; all graphs share one memory pool.

    Record large computations first, so that smaller ones reuse their memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, compute: Computation) -> Computation:
        with torch.cuda.device(self._device):
            self._warm_up(compute)
            graph = torch.cuda.CUDAGraph()
            # other threads of an engine may query the device meanwhile
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                output = compute()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    def _warm_up(self, compute: Computation) -> None:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(NUM_WARM_UPS):
                compute()
        current.wait_stream(self._stream)
