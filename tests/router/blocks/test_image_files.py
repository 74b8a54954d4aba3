"""Encoded images as files: found by their key alone, bounded, and never damaged."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from vlmserve.router.blocks.image_files import HEAD, DamagedImageError, ImageFiles
from vlmserve.router.blocks.image_pool import ImageKey

KEY = ImageKey("tenant", b"content", 4, 560, 6, "adapter")
DATA = memoryview(b"keys and values " * 64)


@dataclass
class Folder:
    path: Path

    def files(self, limit_bytes: int = 1 << 20, signature: bytes = b"model") -> ImageFiles:
        return ImageFiles(self.path, limit_bytes, signature)

    def total(self) -> int:
        return sum(one.stat().st_size for one in self.path.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def stored(folder: Folder) -> tuple[ImageFiles, Path]:
    files = folder.files()
    assert files.write(files.name_of(KEY), DATA)
    return files, folder.path / files.name_of(KEY)


def test_another_process_reads_what_was_written(folder: Folder) -> None:
    stored(folder)
    files = folder.files()
    assert files.has(files.name_of(KEY))
    assert files.read(files.name_of(KEY), len(DATA)) == DATA


@pytest.mark.parametrize(
    "changed",
    [
        {"tenant": "other"},
        {"content_hash": b"other"},
        {"num_tiles": 3},
        {"tile_size": 448},
        {"aspect_ratio_id": 5},
        {"adapter": ""},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_no_other_key_finds_an_image(folder: Folder, changed: dict[str, object]) -> None:
    files, _ = stored(folder)
    name = files.name_of(KEY._replace(**changed))
    assert not files.has(name)
    assert files.read(name, len(DATA)) is None


def test_another_model_finds_nothing(folder: Folder) -> None:
    stored(folder)
    other = folder.files(signature=b"another model")
    assert not other.has(other.name_of(KEY))


@pytest.mark.parametrize("what", ["a bit", "cut", "empty", "longer", "another's file"])
def test_a_damaged_file_is_reported_and_removed(folder: Folder, what: str) -> None:
    files, path = stored(folder)
    whole = bytearray(path.read_bytes())
    if what == "a bit":
        whole[-3] ^= 4
    elif what == "another's file":
        other = files.name_of(KEY._replace(tenant="other"))
        files.write(other, DATA)
        whole = bytearray((folder.path / other).read_bytes())
    else:
        whole = {"cut": whole[:-9], "empty": bytearray(), "longer": whole + b"x"}[what]
    path.write_bytes(whole)
    with pytest.raises(DamagedImageError, match=path.name[:16]):
        files.read(path.name, len(DATA))
    assert not path.exists()
    assert files.read(path.name, len(DATA)) is None


def test_all_bytes_stay_within_the_bound_and_the_longest_unused_goes_first(
    folder: Folder,
) -> None:
    size = len(DATA) + HEAD.size
    writers = [folder.files(3 * size), folder.files(3 * size)]  # of two replicas
    names = [writers[0].name_of(KEY._replace(content_hash=bytes([i]))) for i in range(9)]
    for index, name in enumerate(names):
        assert writers[index % 2].write(name, DATA)
        os.utime(folder.path / name, ns=(index, index))
        writers[0].read(names[0], len(DATA))  # used again and again
        assert folder.total() <= 3 * size
    assert [writers[0].has(name) for name in names] == [True, *[False] * 6, True, True]
    assert sum(one.num_evictions for one in writers) == 6
    assert writers[0].num_bytes() == 3 * size


def test_an_image_beyond_the_bound_is_not_written(folder: Folder) -> None:
    files = folder.files(limit_bytes=len(DATA))
    assert not files.write(files.name_of(KEY), DATA)
    assert folder.total() == 0


def test_what_a_killed_writer_left_is_removed_by_the_next(folder: Folder) -> None:
    (folder.path / "half.new").write_bytes(b"x" * 1000)
    files, path = stored(folder)
    assert sorted(os.listdir(folder.path)) == sorted(["lock", path.name])
    assert files.num_evictions == 0


def test_the_number_of_files_is_bounded(folder: Folder, monkeypatch) -> None:
    monkeypatch.setattr("vlmserve.router.blocks.image_files.MAX_FILES", 2)
    files = folder.files()
    for i in range(5):
        files.write(files.name_of(KEY._replace(content_hash=bytes([i]))), DATA)
    assert len(os.listdir(folder.path)) == 3  # with the lock


def test_files_are_private(folder: Folder) -> None:
    _, path = stored(folder)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_failed_write_leaves_nothing(folder: Folder) -> None:
    files = folder.files()
    name = files.name_of(KEY)
    (folder.path / name).mkdir()  # the rename fails
    with pytest.raises(OSError, match="director"):
        files.write(name, DATA)
    assert sorted(os.listdir(folder.path)) == sorted([name, "lock"])
