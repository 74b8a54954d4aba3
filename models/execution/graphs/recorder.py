"""Records a computation over fixed memory and replays it; CUDA's graphs are the one that serves.

Owns streams, capture and the memory that all graphs share. Knows nothing of what is computed.

What is recorded reads and writes the same memory at every replay, and every number that Python
passed to a kernel stays what it was: a computation must take all that changes from tensors.
"""

from __future__ import annotations

import contextlib
import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Computation = Callable[[], Tensor]

# passes before a capture: kernels are compiled, and libraries take their workspaces
NUM_WARM_UPS = 2


@contextlib.contextmanager
def frozen_objects() -> Iterator[None]:
    """Let collections of garbage pass over all objects that there are.

    torch collects before every capture, which takes as long as a capture with so many objects.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Recorder(ABC):
    """Makes replays of computations on one device."""

    @abstractmethod
    def record(self, compute: Computation) -> Computation:
        """What replays `compute`: the same tensor each time, which the next replay overwrites.

        Also a replay of another computation may overwrite it. What `compute` reads must be kept by
        the caller: a replay knows its place in memory alone.
        """


class CudaRecorder(Recorder):
    """By CUDA graphs, captured on a stream beside the current one; all share one memory pool.

    Record large computations first, so that smaller ones find their memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, compute: Computation) -> Computation:
        """See `Recorder.record`."""
        with torch.cuda.device(self._device):
            self._warm_up(compute)
            graph = torch.cuda.CUDAGraph()
            # other threads of an engine may ask the device something meanwhile
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
