"""Times a short trial on a CPU: by the processor time of one thread.

So that other work on the cores does not change what the trial finds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# how often a trial is repeated
NUM_TIMES = 5


def fastest_s(run: Callable[[], object]) -> float:
    """The seconds of this thread's processor time that the fastest of a few runs took."""
    times = []
    for _ in range(NUM_TIMES):
        began = time.thread_time()
        run()
        times.append(time.thread_time() - began)
    return min(times)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread, within the context."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
