"""Pictures kept after use: in the engine's pool, and as tiles in the HTTP worker."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from support.fake_runner import FakeRunner, expected_token_ids, fake_image, fake_info

from vlmserve.models.batch import ImageSpan, ImageTiles, PoolSizes, SamplingParams
from vlmserve.models.bundled import CHECKPOINT
from vlmserve.models.bundled.pictures import draw, random_scene
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.kv_cache.pool_sizes import PoolPlan
from vlmserve.models.weights.loader import load_model
from vlmserve.router.blocks.image_pool import ImageEntry, ImageKey, ImagePool
from vlmserve.router.errors import OutOfBlocksError
from vlmserve.router.messages import AddRequest
from vlmserve.router.scheduler.interface import SchedulerLimits
from vlmserve.router.scheduler.request_queue import QueueLimits, RequestQueue
from vlmserve.router.scheduler.scheduler import Scheduler
from vlmserve.router.scheduler.sequence import Sequence
from vlmserve.server.images.loader import ImageLoader
from vlmserve.server.images.settings import ImageError, ImageRequest, ImageSettings
from vlmserve.server.images.sources import RemoteImage
from vlmserve.server.images.tile_cache import TileCache
from vlmserve.server.images.tiling import TilingConfig, cut
from vlmserve.server.prompts.conversation import ImagePart, Message, TextPart
from vlmserve.server.prompts.processor import Processor

# The pool


def acquire(pool: ImagePool, *names: str, tenant: str = "") -> list[ImageEntry]:
    """Acquire pictures whose last letter is their number of tiles."""
    images = [fake_image(name, num_tiles=int(name[-1])) for name in names]
    keys = [ImageKey.of(image, tenant) for image in images]
    pool.count_lookups(keys)
    return pool.acquire(keys)


def use(pool: ImagePool, *names: str, tenant: str = "") -> list[ImageEntry]:
    """Acquire, encode and release pictures."""
    entries = acquire(pool, *names, tenant=tenant)
    for entry in entries:
        entry.is_encoded = True
    pool.release(entries)
    pool.check()
    return entries


def figures(pool: ImagePool) -> tuple[int, int, int]:
    counts = pool.snapshot()
    assert counts.free + counts.cached + counts.used == counts.total == 4
    return counts.num_hits, counts.num_misses, counts.num_evictions


def test_an_encoded_picture_stays_and_is_found_encoded():
    pool = ImagePool(4)
    (first,) = use(pool, "p3")
    counts = pool.snapshot()
    assert (counts.cached, counts.used) == (3, 0)
    (again,) = acquire(pool, "p3")
    assert again is first
    assert again.is_encoded
    counts = pool.snapshot()
    assert (counts.cached, counts.used) == (0, 3)
    assert figures(pool) == (1, 1, 0)


def test_a_picture_that_no_step_encoded_does_not_stay():
    pool = ImagePool(4)
    pool.release(acquire(pool, "p3"))
    pool.check()
    assert pool.snapshot().free == 4
    assert not acquire(pool, "p3")[0].is_encoded


def test_the_picture_used_longest_ago_goes_first_and_only_for_room():
    pool = ImagePool(4)
    for name in ("p1", "q1", "r1", "p1"):
        use(pool, name)
    use(pool, "s2")
    assert pool.has_encoded(ImageKey.of(fake_image("p1", 1), ""))
    assert not pool.has_encoded(ImageKey.of(fake_image("q1", 1), ""))
    assert pool.has_encoded(ImageKey.of(fake_image("r1", 1), ""))
    assert figures(pool) == (1, 4, 1)


def test_pictures_that_come_together_do_not_evict_each_other():
    pool = ImagePool(4)
    use(pool, "p2")
    use(pool, "q1")
    entries = acquire(pool, "r2", "p2")
    pool.check()
    assert [entry.is_encoded for entry in entries] == [False, True]
    assert not pool.can_acquire([ImageKey.of(fake_image("q1", 1), "")])
    with pytest.raises(OutOfBlocksError, match="0 blocks are available"):
        acquire(pool, "q1")


def test_a_used_picture_is_never_evicted():
    pool = ImagePool(4)
    held = acquire(pool, "p3")
    held[0].is_encoded = True
    use(pool, "q1")
    use(pool, "r1")
    assert acquire(pool, "p3") == held
    assert figures(pool) == (1, 3, 1)


def test_another_tenant_does_not_find_a_picture():
    pool = ImagePool(4)
    use(pool, "p1")
    assert not acquire(pool, "p1", tenant="t")[0].is_encoded


# The scheduler


def scheduler_of(runner: Any, **limits: Any) -> Scheduler:
    all_limits = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "max_num_batched_images": 4,
        "max_model_len": runner.info.max_model_len,
    } | limits
    return Scheduler(
        runner.info, SchedulerLimits(**all_limits), RequestQueue(QueueLimits(99, 10**6, 10**9))
    )


def answer(scheduler: Scheduler, runner: Any, request: AddRequest) -> Sequence:
    """Run one request to its end."""
    sequence = Sequence(request.request_id, 0, request)
    scheduler.queue.put(sequence)
    while (batch := scheduler.schedule()) is not None:
        scheduler.update(runner.execute(batch))
        scheduler.check()
    return sequence


def generated(sequence: Sequence) -> list[int]:
    return sequence.token_ids[len(sequence.request.prompt_token_ids) :]


@pytest.mark.parametrize("has_prefix_cache", [True, False])
def test_the_same_picture_at_another_place_is_not_encoded_again(has_prefix_cache):
    runner = FakeRunner(fake_info(PoolSizes(32, 4, 4), 64))
    scheduler = scheduler_of(runner, prefix_cache=has_prefix_cache)
    for start in (0, 3, 9, 3):
        request = AddRequest(
            request_id=str(start),
            prompt_token_ids=list(range(12)),
            images=[fake_image("p", 2)],
            spans=[ImageSpan(start)],
            max_tokens=4,
        )
        assert generated(answer(scheduler, runner, request)) == expected_token_ids(request)
    assert runner.num_images_encoded == scheduler.snapshot().num_images_encoded == 1


def test_switched_off_every_request_encodes_its_pictures():
    runner = FakeRunner(fake_info(PoolSizes(32, 4, 4), 64))
    scheduler = scheduler_of(runner, image_cache=False)
    for _ in range(2):
        request = AddRequest(
            request_id="a",
            prompt_token_ids=[1, 2],
            images=[fake_image("p")],
            spans=[ImageSpan(0)],
            max_tokens=2,
        )
        answer(scheduler, runner, request)
    assert runner.num_images_encoded == 2
    assert scheduler.snapshot().images.free == 4


def test_an_image_of_a_failed_step_is_not_kept():
    runner = FakeRunner(fake_info(PoolSizes(32, 4, 4), 64))
    scheduler = scheduler_of(runner)
    request = AddRequest(
        request_id="a",
        prompt_token_ids=[1, 2],
        images=[fake_image("p")],
        spans=[ImageSpan(0)],
        max_tokens=2,
    )
    scheduler.queue.put(Sequence("a", 0, request))
    assert scheduler.schedule() is not None
    scheduler.fail_step()
    scheduler.check()
    assert scheduler.snapshot().images.free == 4
    assert generated(answer(scheduler, runner, request)) == expected_token_ids(request)


# The bundled model, float32


class TurnTaker:
    """The bundled model behind a scheduler, asked turn by turn about one picture."""

    def __init__(self, **limits: bool) -> None:
        sizes = PoolSizes(num_text_blocks=64, num_image_blocks=8, block_size=16)
        self.runner = ModelRunner(
            load_model(str(CHECKPOINT), "cpu", "float32"), PoolPlan(sizes, 512)
        )
        self.scheduler = scheduler_of(self.runner, **limits)
        self.processor = Processor.from_folder(CHECKPOINT, "front")

    def ask(self, messages: list[Message], tiles: ImageTiles) -> Sequence:
        prompt = self.processor.prepare(messages, 500)
        request = AddRequest(
            request_id="a",
            prompt_token_ids=prompt.token_ids,
            images=[tiles],
            spans=prompt.spans,
            sampling=SamplingParams(temperature=0.0),
            max_tokens=24,
            eos_token_ids=self.processor.eos_token_ids,
        )
        return answer(self.scheduler, self.runner, request)

    def say(self, sequence: Sequence) -> str:
        return self.processor.tokenizer.decode(generated(sequence))


def test_a_second_turn_on_the_same_picture_runs_no_vision_and_answers_the_same():
    scene = random_scene(np.random.default_rng(11), num_shapes=2, size=(300, 200))
    tiles = cut(draw(scene), TilingConfig.from_checkpoint(CHECKPOINT), content_hash=b"p")
    picture = ImagePart("data:", "messages[0]")
    first_turn = [Message("user", (picture, TextPart("What is in the picture?")))]
    cached, plain = TurnTaker(), TurnTaker(prefix_cache=False, image_cache=False)
    said = []
    for taker in (cached, plain):
        first = taker.ask(first_turn, tiles)
        turns = [
            *first_turn,
            Message("assistant", (TextPart(taker.say(first)),)),
            Message("user", (TextPart("How many shapes are there?"),)),
        ]
        second = taker.ask(turns, tiles)
        said.append((generated(first), generated(second)))
        is_cached = taker is cached
        assert taker.scheduler.snapshot().num_images_encoded == (1 if is_cached else 2)
        assert (second.num_cached_tokens > 0) is is_cached
    assert said[0] == said[1]
    assert len(said[0][0]) > 1


# Tiles in the HTTP worker


def test_tiles_are_bounded_in_bytes_and_the_oldest_go_first():
    async def scenario() -> None:
        cache = TileCache(max_bytes=30)
        keys = [await cache.key_of(bytes([i]), None, "") for i in range(3)]
        for key in keys[:2]:
            cache.put(key, fake_image("p", 1))  # 12 bytes
        assert cache.get(keys[0]) is not None
        cache.put(keys[2], fake_image("q", 1))
        assert (cache.get(keys[1]), cache.num_bytes, len(cache)) == (None, 24, 2)
        large = await cache.key_of(b"large", None, "")
        cache.put(large, fake_image("r", 3))
        assert cache.get(large) is None
        assert cache.num_bytes == 24

    asyncio.run(scenario())


def test_row_36_other_bytes_tile_limit_or_tenant_is_another_key():
    async def scenario() -> None:
        cache = TileCache(max_bytes=30)
        asked = [(b"a", None, ""), (b"b", None, ""), (b"a", 1, ""), (b"a", None, "t")]
        assert len({await cache.key_of(*one) for one in asked}) == 4
        large = b"x" * 2_000_000
        assert await cache.key_of(large, None, "") == await cache.key_of(large, None, "")

    asyncio.run(scenario())


PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (4).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0" + b"\0" * 20


class CountingDecoders:
    """Gives one tile for any image, and counts."""

    def __init__(self) -> None:
        self.num_decoded = 0
        self.fails = False

    async def decode(self, data: bytes, max_tiles: int | None, *_: Any, **__: Any) -> ImageTiles:
        self.num_decoded += 1
        if self.fails:
            raise ImageError("broken")
        return fake_image("p")


class OneFileFetcher:
    """Serves the same picture for every URL."""

    async def fetch(self, source: RemoteImage, on_bytes: Any, *_: Any, **__: Any) -> bytes:
        on_bytes(len(PNG))
        return PNG


def loads(decoders: CountingDecoders, *images: ImageRequest, **settings: Any) -> None:
    async def scenario() -> None:
        loader = ImageLoader(ImageSettings(**settings), OneFileFetcher(), decoders)  # type: ignore[arg-type]
        for image in images:
            try:
                await loader.load([image])
            except ImageError:
                decoders.fails = False

    asyncio.run(scenario())


def test_the_same_bytes_are_decoded_once_whatever_their_url():
    decoders = CountingDecoders()
    loads(decoders, *(ImageRequest(f"https://host/{name}") for name in "abc"))
    assert decoders.num_decoded == 1


def test_another_tenant_or_tile_limit_decodes_again_and_so_does_a_cache_of_nothing():
    decoders = CountingDecoders()
    url = "https://host/a"
    loads(decoders, ImageRequest(url), ImageRequest(url, 1), ImageRequest(url, None, "t"))
    assert decoders.num_decoded == 3
    loads(decoders, ImageRequest(url), ImageRequest(url), tile_cache_bytes=0)
    assert decoders.num_decoded == 5


def test_a_picture_that_could_not_be_decoded_is_tried_again():
    decoders = CountingDecoders()
    decoders.fails = True
    loads(decoders, ImageRequest("https://host/a"), ImageRequest("https://host/a"))
    assert decoders.num_decoded == 2
