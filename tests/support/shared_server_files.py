"""Which files of tests share one server, so that one process of a run starts it.

`--dist loadfile` gives a process whole files, so that each process would come to a file that asks
the shared server, and start its own: ten seconds of a core. Here these files go to one process.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from xdist.scheduler import LoadFileScheduling

# A test that asks for the shared server, by itself or with its standing assertions; and a file
# whose tests ask a server of their own by that name.
ASKS = re.compile(r"^(?:async )?def test_\w+\([^)]*\b(server|standing)\b", re.M)
HAS_ITS_OWN = re.compile(r"^def (server|standing)\(", re.M)
SHARED = "shared server"
TESTS = Path(__file__).parents[1]


class SharedServerScheduling(LoadFileScheduling):  # type: ignore[misc]
    """`--dist loadfile`, with the files of the shared server as one file.

    One process has them all. They take less than half of a run, so the others do not wait for it.
    """

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return SHARED if file in shared_server_files() else file


@functools.cache
def shared_server_files() -> frozenset[str]:
    """The files whose tests ask the shared server, from the root."""
    files = {path.relative_to(TESTS.parent).as_posix(): path for path in TESTS.rglob("test_*.py")}
    texts = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    return frozenset(
        name for name, text in texts.items() if ASKS.search(text) and not HAS_ITS_OWN.search(text)
    )


def make_scheduler(config: Any, log: Any) -> SharedServerScheduling | None:
    """The scheduler of an ordinary run by files; None leaves another choice as it is.

    Slow tests of these files take longer than a server's start.
    """
    if config.getoption("dist") != "loadfile" or "not slow" not in config.getoption("markexpr"):
        return None
    return SharedServerScheduling(config, log)
