"""What a step frees stays for the next one: no page fault for memory that was there before."""

import subprocess
import sys

from vlmserve.models.malloc import SLACK_BYTES, KeptMemory

SCRIPT = """
import resource, sys, threading
import numpy as np
from vlmserve.models import malloc

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffers = [np.ones(3 << 20, dtype=np.uint8) for _ in range(40)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def steps():
    faults_of_a_step()
    print(faults_of_a_step())

if "keep" in sys.argv:
    malloc.use_one_heap()
    malloc.keep_freed_buffers()
thread = threading.Thread(target=steps)
thread.start()
thread.join()
"""


def faults(*arguments: str) -> int:
    """Page faults of a thread's second step of forty buffers of 3 MiB, in a fresh process."""
    command = [sys.executable, "-c", SCRIPT, *arguments]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_a_steps_buffers_fault_once_and_not_in_every_step() -> None:
    """A decode of 64 sequences with images spent a third of its time on 13,000 page faults."""
    assert faults("keep") < 100 < 10_000 < faults()


def test_freed_memory_is_returned_only_above_the_limit_and_then_rarely() -> None:
    used, num_reads = 0, 0

    def read() -> int:
        nonlocal num_reads
        num_reads += 1
        return used

    kept = KeptMemory(1000, interval=4, read=read)
    for _ in range(8):
        kept.after_step()
    assert (num_reads, kept.num_returns) == (2, 0)
    used = 1001
    for _ in range(40):
        kept.after_step()
    assert kept.num_returns == 1, "what stays in use must not be returned in vain again and again"
    used += SLACK_BYTES + 1
    for _ in range(40):
        kept.after_step()
    assert kept.num_returns == 2


GROWTH = """
import sys
import numpy as np
from vlmserve.models.malloc import KeptMemory, keep_freed_buffers, private_bytes, use_one_heap

use_one_heap()
keep_freed_buffers()
kept = KeptMemory(private_bytes() + (16 << 20), interval=1)
most, held = 0, []
for number in range(30):
    # Buffers of other sizes each time, and a small one that stays behind them.
    buffers = [np.ones(((number * 7 + i) % 5 + 1) << 20, dtype=np.uint8) for i in range(16)]
    held.append(np.ones(1000, dtype=np.uint8))
    del buffers
    if "bound" in sys.argv:
        kept.after_step()
    most = max(most, private_bytes())
print(private_bytes() - kept.limit_bytes)
"""


def beyond_the_limit(*arguments: str) -> int:
    """Bytes above the limit after 30 steps that free all their buffers, in a fresh process."""
    command = [sys.executable, "-c", GROWTH, *arguments]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_row_64_memory_that_steps_have_freed_stays_below_the_limit() -> None:
    """Before: up to a gibibyte of freed memory stayed, whatever was planned for the engine."""
    assert beyond_the_limit("bound") <= 0 < beyond_the_limit()
