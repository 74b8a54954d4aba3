"""The names of adapters: shared by workers, found in a watched folder, confined for requests."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from support.http_side import ScriptedEngine
from support.polling import until

from vlmserve.models.batch import AdapterRef
from vlmserve.models.lora.files import CONFIG, WEIGHTS
from vlmserve.router.errors import EngineDeadError
from vlmserve.server.adapters import registry as registry_module
from vlmserve.server.adapters.adapters import WorkerAdapters
from vlmserve.server.adapters.names import OutsideError, folder_below, why_not
from vlmserve.server.adapters.registry import AdapterRegistry, NameTakenError
from vlmserve.server.adapters.settings import AdapterSettings, Origin, ServedAdapter
from vlmserve.server.adapters.source import AdapterSource
from vlmserve.server.errors import BadRequestError, NotFoundError, NotReadyError


def served(name: str, origin: Origin = "request", digest: str = "d") -> ServedAdapter:
    return ServedAdapter(AdapterRef(name, f"/a/{name}", digest), name, 1, origin)


def never(origin: Origin) -> bool:
    return False


def write_adapter(folder: Path, weights: str = "w") -> Path:
    """A folder that looks like an adapter to whoever does not read it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text("{}")
    (folder / WEIGHTS).write_text(weights)
    return folder


# The registry


def test_workers_share_the_names(tmp_path):
    start = [served("fixed", "start")]
    workers = [AdapterRegistry(start, ["model"], tmp_path) for _ in range(2)]
    workers[0].add(served("new"), never)
    assert [one.name for one in workers[1].all()] == ["fixed", "new"]
    assert workers[1].remove("fixed") == start[0]
    assert workers[0].find("fixed") is None
    assert workers[0].remove("fixed") is None
    # a worker that starts again
    assert [one.name for one in AdapterRegistry(start, ["model"], tmp_path).all()] == ["new"]


def test_the_file_is_read_only_after_a_change(tmp_path, monkeypatch):
    first, second = (AdapterRegistry((), (), tmp_path) for _ in range(2))
    first.add(served("a"), never)
    reads = []
    whole = AdapterRegistry._read
    monkeypatch.setattr(AdapterRegistry, "_read", lambda self: reads.append(1) or whole(self))
    for _ in range(3):
        assert second.find("a") is not None
    assert len(reads) == 1


@pytest.mark.parametrize("folder", [True, False])
def test_a_name_is_served_once(tmp_path, folder):
    registry = AdapterRegistry([served("a", "start")], ["model"], tmp_path if folder else None)
    for name in ("a", "model"):
        with pytest.raises(NameTakenError, match=name):
            registry.add(served(name), never)
    newer = served("a", digest="e")
    registry.add(newer, lambda origin: origin == "start")
    assert registry.all() == [newer]


def test_the_number_of_adapters_is_bounded(monkeypatch):
    monkeypatch.setattr(registry_module, "MAX_ADAPTERS", 2)
    registry = AdapterRegistry([served("a"), served("b")])
    with pytest.raises(BadRequestError, match="2 adapters are served"):
        registry.add(served("c"), never)
    registry.add(served("b", digest="e"), lambda origin: True)


# Names and paths


@pytest.mark.parametrize("name", ["a", "org/name", "v1.2_x-3:b@c+d", "x" * 128])
def test_usual_names_are_allowed(name):
    assert why_not(name) is None


@pytest.mark.parametrize("name", ["", "-a", "/a", "a,b", "a b", "a\n", 'a"', "ä", "x" * 129])
def test_other_names_are_not(name):
    assert why_not(name) is not None


def test_row_77_paths_stay_below_the_root(tmp_path):
    root, outside = tmp_path / "root", write_adapter(tmp_path / "outside")
    inside = write_adapter(root / "sub" / "a")
    (root / "link").symlink_to(inside)
    for path in ("sub/a", "sub/../sub/a/", str(inside), "link"):
        assert folder_below(path, root) == inside.resolve()
    (root / "escape").symlink_to(outside)
    (root / "circle").symlink_to(root / "circle")
    write_adapter(root / "file")
    (root / "file" / WEIGHTS).unlink()
    (root / "file" / WEIGHTS).symlink_to(outside / WEIGHTS)
    for path in (str(outside), "../outside", "/", "sub/../../outside", "escape", "file", "a\0b"):
        with pytest.raises(OutsideError):
            folder_below(path, root)
    for path in ("none", "circle", str(inside / CONFIG)):
        with pytest.raises(NotFoundError):
            folder_below(path, root)


def test_row_77_an_answer_does_not_show_what_exists_outside(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    texts = set()
    for path in ("/etc/passwd", "/nowhere/at/all"):
        with pytest.raises(OutsideError) as refused:
            folder_below(path, root)
        texts.add(refused.value.message)
    assert len(texts) == 1


def test_a_root_behind_a_symlink_takes_both_of_its_paths(tmp_path):
    inside = write_adapter(tmp_path / "real" / "a")
    (tmp_path / "root").symlink_to(tmp_path / "real")
    for path in (inside, tmp_path / "root" / "a"):
        assert folder_below(str(path), tmp_path / "root") == inside.resolve()


# A watched folder


class Watched:
    """A worker that watches a folder, and its engine."""

    def __init__(self, folder: Path, shared: Path | None = None) -> None:
        self.engine = ScriptedEngine(lambda request: [])
        settings = AdapterSettings(lora_source=str(folder), lora_refresh_s=0.1)
        self.worker = WorkerAdapters(settings, ["model"], self.engine, shared)
        source = self.worker._source
        assert source is not None
        self.source: AdapterSource = source

    @property
    def names(self) -> list[str]:
        return sorted(one.name for one in self.worker.registry.all())


def run(scenario: Any) -> None:
    asyncio.run(scenario)


def test_subfolders_are_served_changed_and_removed(tmp_path):
    async def scenario() -> None:
        watched = Watched(tmp_path)
        write_adapter(tmp_path / "a")
        write_adapter(tmp_path / ".hidden")
        (tmp_path / "half").mkdir()
        (tmp_path / "half" / CONFIG).write_text("{}")
        await watched.source.look()
        await watched.source.look()
        assert watched.names == ["a"]
        assert len(watched.engine.loaded) == 1, "an unchanged folder is not read again"
        before = watched.worker.registry.find("a")
        (tmp_path / "half" / WEIGHTS).write_text("w")
        write_adapter(tmp_path / "a", "other weights")
        await watched.source.look()
        assert watched.names == ["a", "half"]
        after = watched.worker.registry.find("a")
        assert after.ref.digest != before.ref.digest
        await until(lambda: watched.engine.unloaded == [before.ref.digest])
        (tmp_path / "a").rename(tmp_path / "b")
        await watched.source.look()
        assert watched.names == ["b", "half"]
        await watched.worker.close()

    run(scenario())


def test_what_cannot_be_used_is_logged_once_and_tried_again_when_it_changes(tmp_path, caplog):
    async def scenario() -> None:
        watched = Watched(tmp_path)
        write_adapter(tmp_path / "broken")
        write_adapter(tmp_path / "bad name")
        write_adapter(tmp_path / "model")
        write_adapter(tmp_path / "good")
        for _ in range(2):
            await watched.source.look()
        assert watched.names == ["good"]
        assert len([one for one in caplog.records if one.levelname == "WARNING"]) == 3
        write_adapter(tmp_path / "broken", "mended, it seems")
        await watched.source.look()
        assert len([one for one in caplog.records if one.levelname == "WARNING"]) == 4

    run(scenario())


def test_an_adapter_that_turns_bad_is_no_longer_served(tmp_path, monkeypatch):
    async def scenario() -> None:
        watched = Watched(tmp_path)
        write_adapter(tmp_path / "a")
        await watched.source.look()
        (tmp_path / "a" / WEIGHTS).unlink()
        (tmp_path / "a" / WEIGHTS).mkdir()  # nothing that can be read
        await watched.source.look()
        assert watched.names == []
        await watched.worker.close()

    run(scenario())


def test_while_the_engine_is_away_nothing_is_given_up(tmp_path, monkeypatch):
    async def scenario() -> None:
        watched = Watched(tmp_path)
        write_adapter(tmp_path / "a")

        async def dead(adapter: AdapterRef) -> None:
            raise EngineDeadError("gone")

        with monkeypatch.context() as patch:
            patch.setattr(watched.engine, "load_adapter", dead)
            await watched.source.look()
            with pytest.raises(NotReadyError):
                await watched.worker.updates.load(
                    "b", tmp_path / "a", "b", "request", in_place=False
                )
        assert watched.names == []
        await watched.source.look()
        assert watched.names == ["a"]

    run(scenario())


def test_a_folder_that_is_gone_for_a_while_ends_no_watch(tmp_path, caplog):
    async def scenario() -> None:
        folder = tmp_path / "source"
        watched = Watched(folder)
        watched.worker.open()
        await until(lambda: "--lora-source" in caplog.text)
        write_adapter(folder / "a")
        await until(lambda: watched.names == ["a"])
        await watched.worker.close()

    run(scenario())


def test_one_of_two_workers_watches_and_the_other_takes_over(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmserve.server.adapters.source.RETRY_S", 0.02)

    async def scenario() -> None:
        folder, shared = tmp_path / "source", tmp_path / "shared"
        shared.mkdir()
        write_adapter(folder / "a")
        first, second = Watched(folder, shared), Watched(folder, shared)
        first.worker.open()
        await until(lambda: second.names == ["a"])
        second.worker.open()
        await asyncio.sleep(0)
        assert second.engine.loaded == []
        await first.worker.close()
        write_adapter(folder / "b")
        await until(lambda: first.names == ["a", "b"])
        assert {one.name for one in second.engine.loaded} == {"a", "b"}
        await second.worker.close()

    run(scenario())


def test_a_source_may_have_symlinks_to_anywhere(tmp_path):
    async def scenario() -> None:
        real = write_adapter(tmp_path / "elsewhere")
        (tmp_path / "source").mkdir()
        os.symlink(real, tmp_path / "source" / "a")
        watched = Watched(tmp_path / "source")
        await watched.source.look()
        assert watched.names == ["a"]

    run(scenario())


# Updates


def test_the_engines_forget_an_adapter_only_with_its_last_name(tmp_path):
    async def scenario() -> None:
        watched = Watched(tmp_path)
        updates = watched.worker.updates
        folder = write_adapter(tmp_path / "a")
        for name in ("x", "y"):
            await updates.load(name, folder, "a", "request", in_place=False)
        digest = watched.engine.loaded[0].digest
        await updates.unload("x")
        assert watched.engine.unloaded == []
        await updates.unload("y")
        assert watched.engine.unloaded == [digest]
        with pytest.raises(NotFoundError):
            await updates.unload("y")

    run(scenario())
