"""The bound on bytes that open requests keep: what one key gets, and that all of it comes back."""

from __future__ import annotations

import asyncio
import contextlib
import random

import httpx2
import pytest
from support.http_side import (
    MODEL,
    OneTileImages,
    ScriptedEngine,
    meta_like_tokenizer,
    running_app,
    tokens_one_by_one,
    write_checkpoint,
)
from support.invariants import CHAT, PICTURE, body_for
from support.polling import until

from vlmserve.server.admission.bytes_in_flight import BytesInFlight, keep_bytes
from vlmserve.server.errors import OverloadedError
from vlmserve.server.settings import ServerSettings
from vlmserve.server.worker.app import build_app


def fill(bytes_in_flight: BytesInFlight, key: str) -> int:
    """How many bytes the key gets, one after the other."""
    reservation = bytes_in_flight.reserve(key)
    with contextlib.suppress(OverloadedError):
        while True:
            reservation.add(1)
    return reservation.num_bytes


def test_one_key_gets_half_and_the_next_still_finds_room():
    bytes_in_flight = BytesInFlight(1_200)
    assert fill(bytes_in_flight, "a") == 600
    assert fill(bytes_in_flight, "b") == 300
    assert fill(bytes_in_flight, "c") == 150
    assert bytes_in_flight.num_bytes < 1_200


def test_two_keys_that_fill_it_in_turn_get_a_third_each():
    bytes_in_flight = BytesInFlight(1_200)
    reservations = {key: bytes_in_flight.reserve(key) for key in "ab"}
    with contextlib.suppress(OverloadedError):
        while True:
            for reservation in reservations.values():
                reservation.add(1)
    assert [reservation.num_bytes for reservation in reservations.values()] == [400, 400]


def test_several_requests_of_a_key_count_together():
    bytes_in_flight = BytesInFlight(1_000)
    for _ in range(5):
        bytes_in_flight.reserve("a").add(100)
    with pytest.raises(OverloadedError, match="try again later") as refused:
        bytes_in_flight.reserve("a").add(1)
    assert refused.value.retry_after_s == 1.0


def test_a_refused_or_released_request_leaves_nothing():
    bytes_in_flight = BytesInFlight(100)
    with pytest.raises(OverloadedError):
        bytes_in_flight.reserve("a").add(1_000)
    assert (bytes_in_flight.num_bytes, bytes_in_flight.num_keys) == (0, 0)
    reservation = bytes_in_flight.reserve("a")
    reservation.add(40)
    for _ in range(2):
        reservation.release()
        reservation.add(10)  # a cancelled download's last chunk
    assert (bytes_in_flight.num_bytes, bytes_in_flight.num_keys) == (0, 0)


def test_any_order_of_requests_keeps_the_bound_and_ends_at_zero():
    rng = random.Random(13)
    bytes_in_flight = BytesInFlight(10_000)
    open_requests = []
    for _ in range(5_000):
        if open_requests and rng.random() < 0.4:
            open_requests.pop(rng.randrange(len(open_requests))).release()
        else:
            open_requests.append(bytes_in_flight.reserve(rng.choice("abc")))
            with contextlib.suppress(OverloadedError):
                open_requests[-1].add(rng.randrange(2_000))
        total = sum(reservation.num_bytes for reservation in open_requests)
        assert bytes_in_flight.num_bytes == total <= 10_000
    for reservation in open_requests:
        reservation.release()
    assert (bytes_in_flight.num_bytes, bytes_in_flight.num_keys) == (0, 0)


class HeldImages(OneTileImages):
    """Loads no image before `go` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()

    async def load(self, images, deadline=None):
        keep_bytes(20_000)  # as the downloads of a loader
        await self.go.wait()
        return await super().load(images, deadline)


def test_row_03_a_key_that_fills_the_worker_gets_429_and_another_is_answered(tmp_path):
    """Bodies and downloads of one client took a worker's memory without a bound."""
    tokenizer = meta_like_tokenizer()
    settings = ServerSettings(
        model=str(write_checkpoint(tmp_path)),
        engine_socket="",
        served_model_names=[MODEL],
        api_keys=["one", "two"],
        max_body_bytes=100_000,
        max_bytes_in_flight=200_000,
    )
    images = HeldImages()
    engine = ScriptedEngine(lambda request: list(tokens_one_by_one(tokenizer, "What?")))
    app = build_app(settings, engine_client=engine, images=images)

    async def run() -> None:
        async with running_app(app) as url, httpx2.AsyncClient(base_url=url, timeout=60) as client:

            async def ask(key: str, **more) -> httpx2.Response:
                body = body_for(CHAT, "a" * 30_000, **more) | {"model": MODEL}
                return await client.post(
                    CHAT, json=body, headers={"Authorization": f"Bearer {key}"}
                )

            held = asyncio.create_task(ask("one", images=[PICTURE]))
            await until(lambda: app.ctx.bytes_in_flight.num_bytes > 50_000)
            second = asyncio.create_task(ask("one", images=[PICTURE]))
            await until(lambda: app.ctx.bytes_in_flight.num_bytes > 80_000 or second.done())
            refused = await ask("one")
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert (await ask("two")).status_code == 200
            images.go.set()
            assert (await held).status_code == 200
            await second
            await until(lambda: app.ctx.bytes_in_flight.num_bytes == 0)
            assert app.ctx.bytes_in_flight.num_keys == 0
            assert (await ask("one")).status_code == 200

    asyncio.run(run())


def test_a_bound_that_leaves_no_room_for_one_body_is_refused_at_the_start(tmp_path):
    settings = ServerSettings(
        model=str(write_checkpoint(tmp_path)),
        engine_socket="",
        served_model_names=[MODEL],
        max_bytes_in_flight=100_000_000,
    )
    with pytest.raises(ValueError, match=r"--max-bytes-in-flight is 100,000,000.*67,108,864"):
        build_app(settings, engine_client=ScriptedEngine(lambda request: []))
