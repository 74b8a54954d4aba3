"""A private folder in memory (/dev/shm) for one server, which removes those of dead servers.

A server locks its folder while it runs. The kernel releases the lock when the process ends, however
it ends. So a folder whose lock is free belongs to nobody, in whichever process namespace it was.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .logs import say

ROOT = Path("/dev/shm")
PREFIX, NEW_PREFIX, OWNER = "vlmserve-images-", "vlmserve-new-", "owner"


@contextlib.contextmanager
def memory_folder(is_wanted: bool, root: Path = ROOT) -> Iterator[str]:
    """The path of a new folder of mode 0700, removed at the end; empty if there can be none.

    is_wanted: False only removes what dead servers left.
    """
    with contextlib.suppress(OSError):
        remove_stale(root)
    with contextlib.ExitStack() as stack:
        path = ""
        if is_wanted:
            try:
                path = stack.enter_context(_locked_folder(root))
            except OSError as error:
                say(
                    f"vlmserve: --image-cache-host is off: cannot use {root}: "
                    f"{error.strerror or error}"
                )
        yield path


@contextlib.contextmanager
def _locked_folder(root: Path) -> Iterator[str]:
    # locked before it has the name that others look for
    new = Path(tempfile.mkdtemp(prefix=NEW_PREFIX, dir=root))
    path = root / (PREFIX + new.name.removeprefix(NEW_PREFIX))
    try:
        with open(new / OWNER, "xb") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX)
            (new / "files").mkdir(mode=0o700)
            os.rename(new, path)
            yield str(path / "files")
    finally:
        for one in (new, path):
            shutil.rmtree(one, ignore_errors=True)


def remove_stale(root: Path) -> None:
    """Remove the folders of this user whose server is dead."""
    for entry in os.scandir(root):
        if entry.name.startswith(PREFIX):
            with contextlib.suppress(OSError):
                found = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
                    _remove_if_free(Path(entry.path))


def _remove_if_free(folder: Path) -> None:
    """Raises BlockingIOError if its server runs."""
    with open(folder / OWNER, "rb") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
