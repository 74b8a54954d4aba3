"""Children that the system cannot start, and processes that end while they can open nothing.

Each scenario is a process of its own: it lowers a limit that pytest needs, too.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

START = """
import asyncio, gc, os, resource, threading, time
from pathlib import Path
from vlmserve.server.children.processes import ChildStartError, start_python

def start():
    return start_python(["-c", "import sys; sys.stdin.read()"], os.environ)
"""


def run(scenario: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", START + scenario], capture_output=True, text=True, timeout=60
    )


# The waiter of a child is such a thread: it meets the end of Python while it runs.
ENDS_BESIDE_A_THREAD = """
async def main():
    process = await start()
    process.stdin.close()
    await process.wait()

asyncio.run(main())

def spin():
    while True:
        time.sleep(0)

threading.Thread(target=spin, daemon=True).start()
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
"""


def test_row_60_a_process_that_can_open_nothing_ends_with_its_own_exit_code() -> None:
    """The supervisor was aborted by glibc in one run of twenty, and its exit code was lost."""
    done = run(ENDS_BESIDE_A_THREAD)
    assert (done.returncode, done.stderr) == (0, "")


CAN_OPEN_NOTHING = """
async def main():
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    try:
        await start()
    except ChildStartError as error:
        print(error)

asyncio.run(main())
"""


def test_row_60_a_refused_descriptor_is_one_error() -> None:
    done = run(CAN_OPEN_NOTHING)
    assert (done.stdout, done.stderr) == ("Too many open files\n", "")


CAN_START_NO_THREAD = """
def refuse(thread):
    raise RuntimeError("can't start new thread")

def num_children():
    return len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

async def main():
    start_thread, threading.Thread.start = threading.Thread.start, refuse
    for _ in range(3):
        try:
            await start()
        except ChildStartError as error:
            print(error)
        await asyncio.sleep(0.2)
    threading.Thread.start = start_thread
    process = await start()
    print(num_children())
    process.kill()
    await process.wait()

gc.disable()
asyncio.run(main())
"""


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="no thread waits for a child")
def test_row_60_a_refused_thread_is_one_error_and_leaves_no_process() -> None:
    """The process that was started already was left waiting for its settings, for good."""
    done = run(CAN_START_NO_THREAD)
    assert done.stdout == "can't start new thread\n" * 3 + "1\n"
    assert done.stderr == ""
