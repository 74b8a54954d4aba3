"""Times a short trial on a CPU: by the processor time of one thread.

So that other work on the cores does not change what the trial finds.
"""

from __future__ import annotations

import functools
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# how often a trial is repeated
NUM_TIMES = 5
# Of products: the rows, how much faster one must be over all of them, and at least for each.
TRIED_ROWS, LEAST_GAIN, MOST_LOSS = (1, 9, 128), 1.1, 0.85

# from rows [n, in] to [n, out]
Product = Callable[[Tensor], Tensor]


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


def is_product_faster(
    product: Product,
    others: Sequence[Product],
    num_in: int,
    dtype: torch.dtype,
    least_gain: float = LEAST_GAIN,
) -> bool:
    """Whether a product of rows [n, num_in] is clearly faster than the best of others.

    Of one row, a few and many, since one weight serves all; none may be clearly slower. In 30 ms.
    """
    gains = []
    with torch.inference_mode(), one_thread():
        for count in TRIED_ROWS:
            rows = torch.ones(count, num_in, dtype=dtype)
            other_s = min(fastest_s(functools.partial(other, rows)) for other in others)
            gains.append(other_s / fastest_s(functools.partial(product, rows)))
    logger.debug("a trial product of %s: %s times as fast as others", dtype, gains)
    return min(gains) > MOST_LOSS and statistics.mean(gains) > least_gain
