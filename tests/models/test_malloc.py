"""What a step frees stays for the next one: no page fault for memory that was there before."""

import subprocess
import sys

SCRIPT = """
import resource, sys, threading
import numpy as np
from vlmserve.models import heap

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffers = [np.ones(3 << 20, dtype=np.uint8) for _ in range(40)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def steps():
    faults_of_a_step()
    print(faults_of_a_step())

if "keep" in sys.argv:
    heap.use_one_heap()
    heap.keep_freed_buffers()
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
