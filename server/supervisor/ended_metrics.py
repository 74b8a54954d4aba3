"""The files with the workers' metrics: reserved on disk, and merged when a worker has ended.

prometheus_client maps a file per worker and kind of metric, `counter_PID.db`. It extends the file
without reserving the space: a write to such a page on a full disk ends the process by SIGBUS. So
`reserve` reserves the space first.

A worker that has ended leaves its files. `merge_ended` adds their values to `counter_ended.db` and
removes them. Readers wait meanwhile: otherwise they would count a worker twice or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Collection, Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

# The two kinds of metrics that workers have.
KINDS = ("counter", "histogram")
ENDED, FRESH = "ended", "new"
# Twice what all metrics of a worker take; prometheus_client also starts with this size.
FILE_BYTES = 1 << 20
LOCK = "merge.lock"


def reserve(folder: Path, owner: int | str) -> None:
    """Create the files of a worker, by its process id, with their space on disk.

    Raises OSError if the disk is full or the folder is read-only.
    """
    for file in _files_of(folder, owner):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, FILE_BYTES)
        except OSError:
            file.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def unmerged(folder: Path) -> Iterator[None]:
    """No file of the folder is merged within the context."""
    with contextlib.ExitStack() as stack:
        # Without a lock a reading may count an ended worker twice: better than none.
        with contextlib.suppress(OSError):
            lock = stack.enter_context(open(folder / LOCK, "ab"))
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def merge_ended(folder: Path, running: Collection[int]) -> None:
    """Merge the files of all workers that do not run. running: process ids.

    If the files cannot be merged now, they stay: no count is lost, and a later call merges them.
    """
    try:
        ended = _ended_owners(folder, running)
        if ended:
            with open(folder / LOCK, "ab") as lock:
                # A reader that is stopped must not stop the supervisor.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _merge(folder, ended)
    except BlockingIOError:
        return
    except OSError as error:
        logger.warning("metrics of ended workers stay in their own files: %s", error.strerror)


def _ended_owners(folder: Path, running: Collection[int]) -> list[str]:
    others = {ENDED, FRESH, *map(str, running)}
    files = [name for name in os.listdir(folder) if name.endswith(".db")]
    return sorted({_owner_of(Path(name)) for name in files} - others)


def _merge(folder: Path, ended: Collection[str]) -> None:
    from prometheus_client.mmap_dict import MmapedDict  # only a server whose worker ended needs it

    for file in _files_of(folder, FRESH):
        file.unlink(missing_ok=True)  # of a merge that failed
    reserve(folder, FRESH)
    for kind in KINDS:
        fresh, target = folder / f"{kind}_{FRESH}.db", folder / f"{kind}_{ENDED}.db"
        sources = [folder / f"{kind}_{owner}.db" for owner in ended]
        sums = MmapedDict(str(fresh))
        for source in [target, *sources]:
            for key, value in _values(source):
                sums.write_value(key, sums.read_value(key)[0] + value, 0.0)
        sums.close()
        fresh.replace(target)
        for source in sources:
            source.unlink(missing_ok=True)


def _values(file: Path) -> Iterator[tuple[str, float]]:
    """The values in a file by key; what a worker that was killed wrote only in part is left out."""
    from prometheus_client.mmap_dict import MmapedDict

    try:
        for key, value, _, _ in MmapedDict.read_all_values_from_file(str(file)):
            yield key, value
    except FileNotFoundError:
        return
    except (ValueError, RuntimeError) as error:
        logger.warning("the rest of %s is damaged: %s", file.name, error)


def _files_of(folder: Path, owner: int | str) -> list[Path]:
    return [folder / f"{kind}_{owner}.db" for kind in KINDS]


def _owner_of(file: Path) -> str:
    return file.stem.partition("_")[2]
