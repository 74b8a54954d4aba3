"""Encoded images outlive their engine: over the real socket, with a real model in this process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.engine_rig import Rig, engine_of, tokens_of
from support.oracle import BLOCK_SIZE, image, loaded, prompt
from support.polling import until

from vlmserve.models.batch import PoolSizes, SamplingParams
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.kv_cache.pool_sizes import PoolPlan
from vlmserve.router.engine import host_images
from vlmserve.router.messages import AddRequest

SIZES = PoolSizes(100, 40, BLOCK_SIZE)
GREEDY = SamplingParams(temperature=0.0)


pytestmark = pytest.mark.usefixtures("one_thread")


def about(request_id: str, *seeds: int, text: str = "what?", **fields: object) -> AddRequest:
    """A question about pictures of these seeds."""
    asked = prompt(request_id, "|" * len(seeds) + text, [image(6, seed) for seed in seeds])
    return AddRequest(
        request_id=request_id,
        prompt_token_ids=asked.token_ids,
        images=list(asked.images),
        spans=asked.spans,
        max_tokens=4,
        sampling=GREEDY,
        **fields,
    )


def runs(
    tmp_path: Path,
    scenario: Callable[[Rig], Awaitable[None]],
    *,
    has_tier: bool = True,
    sizes: PoolSizes = SIZES,
    limit: int = 1 << 30,
    **options: object,
) -> None:
    """One engine from its start to its end, as after a kill: only the folder is left of others."""
    folder = tmp_path / "images"
    folder.mkdir(exist_ok=True)

    async def run() -> None:
        runner = ModelRunner(loaded("tiny"), PoolPlan(sizes, 100))
        if has_tier:
            options.update(image_folder=str(folder), image_cache_host_bytes=limit)
        async with engine_of(tmp_path, runner, **options) as rig:
            await scenario(rig)
            await until(lambda: rig.engine._host_images.num_pending == 0)

    asyncio.run(run())


def asks(*requests: AddRequest, into: list[list[int]], counts: dict[str, int] | None = None):
    """A scenario that asks one after the other, and then reads the counts."""

    async def scenario(rig: Rig) -> None:
        client, questions = await rig.connect(), []
        ask = rig.engine._send
        rig.engine.scheduler.tiles._ask = lambda worker, one: (
            questions.append(one),
            ask(worker, one),
        )
        for request in requests:
            into.append(await tokens_of(client, request))
        stats = rig.engine.stats()
        if counts is not None:
            counts.update(
                encoded=stats.num_images_encoded,
                hits=stats.image_host_hits,
                misses=stats.image_host_misses,
                damaged=stats.image_host_damaged,
                asked=len(questions),
            )

    return scenario


@pytest.mark.parametrize("is_int8", [False, True])
def test_a_restarted_engine_answers_about_a_picture_without_its_tiles(
    tmp_path: Path, is_int8: bool
) -> None:
    sizes, answers, counts = replace(SIZES, has_int8_images=is_int8), [], {}
    runs(tmp_path, asks(about("a", 1, 2), into=answers), sizes=sizes)
    runs(tmp_path, asks(about("b", 1, 2), into=answers, counts=counts), sizes=sizes)
    assert counts == {"encoded": 0, "hits": 2, "misses": 0, "damaged": 0, "asked": 0}
    runs(tmp_path, asks(about("c", 1, 2), into=answers), sizes=sizes, has_tier=False)
    assert answers[0] == answers[1] == answers[2]


def test_images_of_another_type_are_not_read(tmp_path: Path) -> None:
    answers, counts = [], {}
    runs(tmp_path, asks(about("a", 1), into=answers))
    int8 = replace(SIZES, has_int8_images=True)
    runs(tmp_path, asks(about("b", 1), into=answers, counts=counts), sizes=int8)
    assert (counts["encoded"], counts["hits"]) == (1, 0)


def test_one_tenant_never_finds_an_image_of_another(tmp_path: Path) -> None:
    answers, counts = [], {}
    runs(tmp_path, asks(about("a", 1, tenant="one"), into=answers))
    runs(tmp_path, asks(about("b", 1, tenant="two"), into=answers, counts=counts))
    assert counts == {"encoded": 1, "hits": 0, "misses": 1, "damaged": 0, "asked": 1}


def test_a_damaged_image_is_encoded_again_and_logged_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answers, counts = [], {}
    runs(tmp_path, asks(about("a", 1), into=answers))
    (file,) = [one for one in (tmp_path / "images").iterdir() if one.name != "lock"]
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)
    with caplog.at_level(logging.WARNING):
        runs(tmp_path, asks(about("b", 1), into=answers, counts=counts))
    assert counts == {"encoded": 1, "hits": 0, "misses": 1, "damaged": 1, "asked": 1}
    assert answers[0] == answers[1]
    (line,) = [one for one in caplog.records if "damaged" in one.getMessage()]
    assert "wrong checksum" in line.getMessage()


@pytest.mark.parametrize("limit", [1 << 30, 30_000])
def test_a_tiny_pool_answers_the_same_with_the_tier_as_without(tmp_path: Path, limit: int) -> None:
    """Pictures evict each other from the pool, and with the small bound from host memory too."""
    pool = replace(SIZES, num_image_blocks=5)
    answers: dict[bool, list[list[int]]] = {}
    counts: dict[str, int] = {}

    def scenario(into: list[list[int]]):
        async def run(rig: Rig) -> None:
            client = await rig.connect()
            for turn in range(3):
                asked = [about(f"{turn}-{i}", i, text=f"{turn}?" * i) for i in range(1, 6)]
                into.extend(await asyncio.gather(*(tokens_of(client, one) for one in asked)))
            counts["hits"] = rig.engine.stats().image_host_hits
            counts["encoded"] = rig.engine.stats().num_images_encoded

        return run

    for has_tier in (False, True):
        answers[has_tier] = []
        runs(tmp_path, scenario(answers[has_tier]), sizes=pool, has_tier=has_tier, limit=limit)
    assert answers[True] == answers[False]
    size = sum(one.stat().st_size for one in (tmp_path / "images").iterdir())
    assert size <= limit
    if limit > 1 << 20:
        assert counts["hits"] > 0
        assert counts["encoded"] < 15


def test_a_full_memory_turns_the_tier_off_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(host_images.ImageFiles, "write", full)
    answers: list[list[int]] = []
    with caplog.at_level(logging.WARNING):
        runs(tmp_path, asks(about("a", 1), about("b", 2), about("c", 3), into=answers))
    assert len(answers) == 3
    (line,) = [one for one in caplog.records if "host memory" in one.getMessage()]
    assert "No space left on device" in line.getMessage()


def test_an_answer_that_ends_while_its_image_is_read_leaves_nothing(tmp_path: Path) -> None:
    runs(tmp_path, asks(about("a", 1), into=[]))

    async def scenario(rig: Rig) -> None:
        client = await rig.connect()
        reads = asyncio.Event()
        read = rig.engine._host_images.start_read
        rig.engine._host_images.start_read = lambda key: (reads.set(), read(key))[1]
        task = asyncio.create_task(tokens_of(client, about("b", 1)))
        await reads.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await rig.settled()

    runs(tmp_path, scenario)


def test_if_writing_falls_behind_images_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_images, "MAX_PENDING", 0)
    dropped: list[int] = []

    async def scenario(rig: Rig) -> None:
        await tokens_of(await rig.connect(), about("a", 1))
        dropped.append(rig.engine.stats().image_host_dropped)

    runs(tmp_path, scenario)
    assert dropped == [1]
    assert [one.name for one in (tmp_path / "images").iterdir()] == []
