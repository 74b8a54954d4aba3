"""The files with workers' metrics: reserved, and merged when their worker has ended."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

from vlmserve.server.supervisor import ended_metrics
from vlmserve.server.supervisor.ended_metrics import FILE_BYTES, merge_ended, reserve, unmerged


def write(folder: Path, owner: int, counts: dict[str, float], seconds: float = 0.0) -> None:
    """A worker's files: counters by label, and one bucket of a histogram."""
    reserve(folder, owner)
    counters = MmapedDict(str(folder / f"counter_{owner}.db"))
    for label, count in counts.items():
        counters.write_value(mmap_key("asked", "asked_total", ("by",), (label,), ""), count, 0.0)
    counters.close()
    times = MmapedDict(str(folder / f"histogram_{owner}.db"))
    times.write_value(mmap_key("took", "took_sum", (), (), ""), seconds, 0.0)
    times.write_value(mmap_key("took", "took_bucket", ("le",), ("+Inf",), ""), 1.0, 0.0)
    times.close()


def sums(folder: Path) -> dict[str, float]:
    """What /metrics shows: the sums over all files."""
    return {
        f"{sample.name}{sorted(sample.labels.values())}": sample.value
        for metric in MultiProcessCollector(None, str(folder)).collect()
        for sample in metric.samples
    }


def test_row_62_the_counts_of_ended_workers_are_merged_and_their_files_removed(tmp_path: Path):
    """Before: two files of a mebibyte stayed for each worker that had ended."""
    write(tmp_path, 1, {"a": 3}, 0.5)
    write(tmp_path, 2, {"a": 4, "b": 5}, 0.25)
    write(tmp_path, 3, {"b": 6}, 2.0)
    before = sums(tmp_path)
    assert before["asked_total['a']"] == 7
    merge_ended(tmp_path, [3])
    assert sums(tmp_path) == before
    assert {file.name for file in tmp_path.glob("*.db")} == {
        "counter_ended.db", "histogram_ended.db", "counter_3.db", "histogram_3.db",
    }  # fmt: skip
    merge_ended(tmp_path, [])
    assert sums(tmp_path) == before
    assert len(list(tmp_path.glob("*.db"))) == 2
    merge_ended(tmp_path, [])
    assert sums(tmp_path) == before


def test_files_do_not_pile_up_over_many_ends(tmp_path: Path):
    for pid in range(1, 30):
        write(tmp_path, pid, {"a": 1}, 0.5)
        merge_ended(tmp_path, [])
    assert len(list(tmp_path.glob("*.db"))) == 2
    assert sums(tmp_path)["asked_total['a']"] == 29
    assert sums(tmp_path)["took_sum[]"] == 14.5


def test_nothing_is_merged_while_somebody_reads(tmp_path: Path):
    write(tmp_path, 1, {"a": 3})
    with unmerged(tmp_path):
        merge_ended(tmp_path, [])
        assert (tmp_path / "counter_1.db").exists()
    merge_ended(tmp_path, [])
    assert not (tmp_path / "counter_1.db").exists()
    with open(tmp_path / ended_metrics.LOCK, "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released


def test_row_62_a_full_disk_leaves_the_files_and_their_counts(tmp_path: Path, monkeypatch, caplog):
    write(tmp_path, 1, {"a": 3})
    before = sums(tmp_path)

    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        merge_ended(tmp_path, [])
    assert sums(tmp_path) == before
    assert "No space left on device" in caplog.text
    merge_ended(tmp_path, [])
    assert sums(tmp_path) == before
    assert not (tmp_path / "counter_1.db").exists()


def test_a_file_that_is_damaged_costs_only_its_own_rest(tmp_path: Path):
    write(tmp_path, 1, {"a": 3})
    write(tmp_path, 2, {"a": 4})
    file = tmp_path / "counter_2.db"
    content = bytearray(file.read_bytes())
    content[8:12] = (1 << 30).to_bytes(4, "little")  # the length of the first key
    file.write_bytes(content)
    merge_ended(tmp_path, [])
    assert sums(tmp_path)["asked_total['a']"] == 3


def test_a_reserved_file_has_all_its_space_and_counts_from_zero(tmp_path: Path):
    reserve(tmp_path, 1)
    file = tmp_path / "counter_1.db"
    assert file.stat().st_blocks * 512 >= FILE_BYTES
    assert sums(tmp_path) == {}
    with pytest.raises(FileNotFoundError):
        reserve(tmp_path / "gone", 1)
