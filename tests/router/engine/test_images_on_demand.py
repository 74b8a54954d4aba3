"""Images cross from worker to engine once: over the real socket, in this process."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from support.engine_rig import engine_of, request_of, tokens_of
from support.fake_runner import FakeRunner, expected_token_ids, fake_image, fake_info
from support.polling import until

from vlmserve.models.batch import ImageSpan, PoolSizes
from vlmserve.router.client import image_sender
from vlmserve.router.client.engine_client import EngineClient, HealthThresholds
from vlmserve.router.client.image_sender import PIECE_BYTES
from vlmserve.router.client.replica_pool import ReplicaPool
from vlmserve.router.errors import EngineDeadError
from vlmserve.router.messages import AddRequest, ImagePiece, NeedImage
from vlmserve.router.processes import wire

TILE_SIZE = 224  # four tiles: 602,112 bytes, in three pieces
LARGE = 560
POOLS = PoolSizes(256, 64, 16)


def runner_of(tile_size: int = TILE_SIZE, pools: PoolSizes = POOLS) -> FakeRunner:
    return FakeRunner(replace(fake_info(pools), tile_size=tile_size))


def about(request_id: str, *names: str, tile_size: int = TILE_SIZE, **fields) -> AddRequest:
    """A prompt about pictures of these names, of four tiles each."""
    return request_of(
        request_id,
        prompt=range(1, 60),
        images=[fake_image(name, 4, tile_size) for name in names],
        spans=[ImageSpan(1 + number) for number in range(len(names))],
        **fields,
    )


class Wire:
    """What a client writes: bytes, messages by kind, and the most bytes in one turn of the loop."""

    def __init__(self, client: EngineClient) -> None:
        self.num_bytes = 0
        self.kinds: Counter[str] = Counter()
        self.most_in_a_turn = 0
        self._in_turn = 0
        writer = client._writer
        assert writer is not None
        self._write = writer.write
        writer.write = self.write  # type: ignore[method-assign]
        writer.writelines = lambda frames: [self.write(one) for one in frames]  # type: ignore

    def write(self, frame: bytes) -> None:
        self.num_bytes += len(frame)
        message = wire.to_engine_decoder.decode(frame[wire.HEADER_BYTES :])
        self.kinds[type(message).__name__] += 1
        if not self._in_turn:
            asyncio.get_running_loop().call_soon(self._end_turn)
        self._in_turn += len(frame)
        self._write(frame)

    def _end_turn(self) -> None:
        self.most_in_a_turn = max(self.most_in_a_turn, self._in_turn)
        self._in_turn = 0


@contextlib.contextmanager
def counted_reads() -> Iterator[list[int]]:
    """The sizes of all reads of messages from a socket, in both directions."""
    sizes: list[int] = []
    read = asyncio.StreamReader.readexactly

    async def counted(reader: asyncio.StreamReader, num_bytes: int) -> bytes:
        sizes.append(num_bytes)
        return await read(reader, num_bytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio.StreamReader, "readexactly", counted)
        yield sizes


def test_a_second_turn_about_sixteen_pictures_sends_ten_kilobytes_at_most(tmp_path: Path) -> None:
    """It sent their tiles again: 57 MiB for pictures of the 11B model."""

    async def scenario() -> None:
        async with engine_of(tmp_path, runner_of()) as rig:
            client = await rig.connect()
            names = [f"p{number}" for number in range(16)]
            sent = Wire(client)
            first = about("first", *names)
            answer = await tokens_of(client, first)
            assert answer == expected_token_ids(first)
            assert sent.kinds == {"AddRequest": 1, "ImagePiece": 16 * 3}
            assert sent.num_bytes > 16 * 602_112
            before = sent.num_bytes
            turn = msgspec.structs.replace(
                first,
                request_id="second",
                prompt_token_ids=[*first.prompt_token_ids, *answer, *range(500)],
            )
            assert await tokens_of(client, turn) == expected_token_ids(turn)
            assert sent.num_bytes - before < 10_000
            assert rig.runner.num_images_encoded == 16

    asyncio.run(scenario())


def test_a_running_request_keeps_no_tiles(tmp_path: Path) -> None:
    """Each kept its own, 57 MiB for 16 pictures of the 11B model, until its end."""

    async def scenario() -> None:
        async with engine_of(tmp_path, runner_of()) as rig:
            client = await rig.connect()
            request = about("a", "p", "q", max_tokens=30)
            async with contextlib.aclosing(client.generate(request)) as outputs:
                await anext(outputs)
                assert rig.engine.stats().num_running == 1
                assert rig.engine.scheduler.tiles.num_bytes == 0

    asyncio.run(scenario())


def test_a_picture_that_many_ask_about_at_once_is_sent_and_encoded_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with engine_of(tmp_path, runner_of(), max_num_seqs=4) as rig:
            clients = [await rig.connect(), await rig.connect()]
            sent = [Wire(client) for client in clients]
            requests = [about(f"r{number}", "p") for number in range(16)]
            answers = await asyncio.gather(
                *(tokens_of(clients[n % 2], request) for n, request in enumerate(requests))
            )
            assert answers == [expected_token_ids(request) for request in requests]
            assert sum(one.kinds["ImagePiece"] for one in sent) == 3
            assert rig.runner.num_images_encoded == 1

    asyncio.run(scenario())


def test_images_that_preemptions_evicted_are_asked_for_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        runner = runner_of(pools=PoolSizes(12, 9, 16))
        options = {"max_num_seqs": 4, "image_cache": False}
        async with engine_of(tmp_path, runner, **options) as rig:
            client = await rig.connect()
            sent = Wire(client)
            requests = [about(f"r{n}", f"p{n}", max_tokens=40) for n in range(4)]
            answers = await asyncio.gather(*(tokens_of(client, one) for one in requests))
            assert answers == [expected_token_ids(request) for request in requests]
            assert rig.engine.stats().num_preemptions > 0
            assert sent.kinds["ImagePiece"] > 4 * 3
            assert sent.kinds["ImagePiece"] == 3 * rig.runner.num_images_encoded

    asyncio.run(scenario())


def test_no_turn_of_either_loop_copies_a_whole_picture(tmp_path: Path) -> None:
    """A picture of 3.8 MB was one frame."""

    async def scenario() -> None:
        async with engine_of(tmp_path, runner_of(LARGE)) as rig:
            client = await rig.connect()
            sent = Wire(client)
            with counted_reads() as sizes:
                request = about("a", "p", tile_size=LARGE)
                assert await tokens_of(client, request) == expected_token_ids(request)
            assert sent.num_bytes > 3_700_000
            assert PIECE_BYTES < max(sizes) <= PIECE_BYTES + 100
            assert sent.most_in_a_turn <= PIECE_BYTES + 1000

    asyncio.run(scenario())


class HeldPieces:
    """Lets a client send so many pieces, and no more before `release`."""

    def __init__(self, client: EngineClient, num_free: int = 0) -> None:
        self._send, self.num_left = client._images._send, num_free
        self.is_waiting, self._is_free = asyncio.Event(), asyncio.Event()
        client._images._send = self._held

    def release(self) -> None:
        self._is_free.set()

    async def _held(self, piece: ImagePiece) -> None:
        if not self.num_left:
            self.is_waiting.set()
            await self._is_free.wait()
        self.num_left -= 1
        await self._send(piece)


def test_a_request_whose_image_is_on_its_way_blocks_no_other(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with engine_of(tmp_path, runner_of(), max_num_seqs=1) as rig:
            client = await rig.connect()
            held = HeldPieces(client, 1)
            request = about("a", "p")
            waiting = asyncio.create_task(tokens_of(client, request))
            await held.is_waiting.wait()
            other = request_of("b")
            assert await tokens_of(client, other) == expected_token_ids(other)
            stats = rig.engine.stats()
            assert (stats.num_waiting, stats.image_blocks_used) == (1, 0)
            assert rig.engine.snapshot().scheduler.waiting_bytes == 602_112
            held.release()
            assert await waiting == expected_token_ids(request)

    asyncio.run(scenario())


def test_a_cancel_while_the_image_is_on_its_way_leaves_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with engine_of(tmp_path, runner_of()) as rig:
            client = await rig.connect()
            held = HeldPieces(client, 1)
            waiting = asyncio.create_task(tokens_of(client, about("a", "p", "q")))
            await held.is_waiting.wait()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await until(lambda: not rig.engine.snapshot().open)
            assert rig.engine.scheduler.tiles.num_bytes == 0
            sent = Wire(client)
            held.release()
            request = about("b", "p")
            assert await tokens_of(client, request) == expected_token_ids(request)
            # One piece was held back when the request ended.
            assert sent.kinds["ImagePiece"] == 1 + 3

    asyncio.run(scenario())


@pytest.mark.parametrize("ending", ["cancel", "worker"])
def test_who_waits_for_the_same_picture_gets_it_from_the_own_worker(
    tmp_path: Path, ending: str
) -> None:
    async def scenario() -> None:
        async with engine_of(tmp_path, runner_of()) as rig:
            first, second = await rig.connect(), await rig.connect()
            held = HeldPieces(first, 2)
            lost = asyncio.create_task(tokens_of(first, about("a", "p")))
            await held.is_waiting.wait()
            sent, request = Wire(second), about("b", "p")
            waiting = asyncio.create_task(tokens_of(second, request))
            await until(lambda: rig.engine.stats().num_waiting == 2)
            assert sent.kinds["ImagePiece"] == 0
            if ending == "cancel":
                lost.cancel()
            else:
                await first.close()
            with pytest.raises((asyncio.CancelledError, EngineDeadError)):
                await lost
            assert await waiting == expected_token_ids(request)
            assert sent.kinds["ImagePiece"] == 3
            held.release()

    asyncio.run(scenario())


def test_an_engine_that_dies_while_it_is_sent_an_image_fails_the_request(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with engine_of(tmp_path, runner_of()) as rig:
            client = await rig.connect()
            held = HeldPieces(client, 1)
            waiting = asyncio.create_task(tokens_of(client, about("a", "p")))
            await held.is_waiting.wait()
            for writer in rig.server._workers.values():
                writer.transport.abort()
            with pytest.raises(EngineDeadError):
                await waiting
            held.release()
            assert client._images._images == {}
            await client.connect(5)
            await client.wait_ready(5)
            request = about("b", "p")
            assert await tokens_of(client, request) == expected_token_ids(request)

    asyncio.run(scenario())


def test_a_worker_that_sends_other_bytes_than_asked_for_is_dropped_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with engine_of(tmp_path, runner_of()) as rig:
            faulty, sound = await rig.connect(), await rig.connect()
            monkeypatch.setattr(
                image_sender, "ImagePiece", lambda **fields: ImagePiece(**fields | {"offset": 7})
            )
            with pytest.raises(EngineDeadError):
                await tokens_of(faulty, about("a", "p"))
            monkeypatch.undo()
            request = about("b", "p")
            assert await tokens_of(sound, request) == expected_token_ids(request)
            assert "violated the protocol" in caplog.text

    asyncio.run(scenario())


def test_a_stuck_engine_makes_the_worker_keep_a_piece_and_no_image(tmp_path: Path) -> None:
    """76 MiB were kept for an engine that did not read, after their requests' end too."""

    async def scenario() -> None:
        async with engine_of(tmp_path, runner_of(LARGE)) as rig:
            reads_again = asyncio.Event()
            receive = rig.server._receive_from

            async def stuck(worker_id: int, reader: asyncio.StreamReader) -> None:
                transport: asyncio.ReadTransport = reader._transport  # type: ignore[attr-defined]
                transport.pause_reading()
                await reads_again.wait()
                transport.resume_reading()
                await receive(worker_id, reader)

            rig.server._receive_from = stuck  # type: ignore[method-assign]
            client = await rig.connect()
            assert client._writer is not None
            unread = client._writer.transport.get_write_buffer_size
            large = about("large", "p", "q", tile_size=LARGE)
            client._images.open([large])
            for number, image in enumerate(large.images):
                client._images.answer(
                    NeedImage(question=number, request_id="large", content_hash=image.content_hash)
                )
            requests = [
                asyncio.create_task(
                    tokens_of(client, msgspec.structs.replace(large, request_id=f"r{number}"))
                )
                for number in range(1000)
            ]
            for _ in range(300):
                await asyncio.sleep(0)
            assert 65_536 < unread() < 65_536 + PIECE_BYTES + 1000
            client._images.close([large])
            for one in requests:
                one.cancel()
            await asyncio.gather(*requests, return_exceptions=True)
            assert unread() < 524_288  # with an abort of 60 bytes for each request that was sent
            assert client._images._images == {}
            reads_again.set()
            request = request_of("later")
            assert await tokens_of(client, request) == expected_token_ids(request)

    asyncio.run(scenario())


def test_a_request_that_moves_to_another_replica_is_asked_by_that_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        folders = [tmp_path / "one", tmp_path / "two"]
        for folder in folders:
            folder.mkdir()
        async with engine_of(folders[0], runner_of()) as one, engine_of(folders[1], runner_of()):
            clients = [await one.connect(), EngineClient(str(folders[1] / "engine.sock"))]
            await clients[1].connect(5)
            await clients[1].wait_ready(5)
            moves: list[str] = []
            pool = ReplicaPool(clients, HealthThresholds(60.0, 60.0), moves.append)
            held = HeldPieces(clients[0], 1)
            request = about("a", "p", "q")
            waiting = asyncio.create_task(tokens_of(pool, request))
            await held.is_waiting.wait()
            for writer in one.server._workers.values():
                writer.transport.abort()
            assert await waiting == expected_token_ids(request)
            assert moves == ["dead"]
            held.release()
            await clients[1].close()

    asyncio.run(scenario())
