"""One key floods a kind of work; another asks for something small. Real children, two keys.

Bounds are counts of the flood's pieces of work that start between, so the machine's speed does not
matter.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import httpx2
import pytest
from support.http_side import (
    CLIENT_DEADLINE_S,
    MODEL,
    NO_AUTHORITIES,
    ScriptedEngine,
    error_of,
    meta_like_tokenizer,
    running_server,
    tokens_one_by_one,
    write_checkpoint,
)
from support.outside import PUBLIC, LoopbackConnector, ScriptedResolver, Site, plain_response
from support.pictures import TILING, encoded, picture, png_of_zeros
from support.polling import until
from support.slow_grammars import slow_schema

from vlmserve.models.bundled import CHECKPOINT
from vlmserve.server.admission.fair_lane import FairLane, LaneLimits
from vlmserve.server.admission.lanes import IMAGE_FETCHES
from vlmserve.server.errors import BadRequestError
from vlmserve.server.images.decoders import DecoderChild, DecoderPool
from vlmserve.server.images.fetch import ImageFetcher
from vlmserve.server.images.settings import ImageSettings
from vlmserve.server.images.sources import RemoteImage, parse_remote_url
from vlmserve.server.settings import ServerSettings
from vlmserve.server.structured_output.compile_checks import NUM_CHILDREN, GrammarChecks
from vlmserve.server.structured_output.grammar_text import json_schema_grammar, regex_grammar

CHAT = "/v1/chat/completions"
FLOOD, OTHER = "flood", "other"


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(CLIENT_DEADLINE_S):
            await scenario()

    asyncio.run(bounded())


async def cancel(tasks: list[asyncio.Task]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_row_54_slow_grammars_of_a_key_do_not_delay_another_s(monkeypatch):
    """Forty of them held another key's for 52 s: they stood in one line, two at a time."""
    asked: list[str] = []
    ask = GrammarChecks._ask_child

    # Noted where the place is taken: the child may have to be started first.
    async def noting(self, grammar):
        asked.append(grammar)
        return await ask(self, grammar)

    monkeypatch.setattr(GrammarChecks, "_ask_child", noting)
    small = regex_grammar("[a-z]+")

    async def scenario() -> None:
        checks = GrammarChecks(CHECKPOINT, timeout_s=0.3)
        flood = [
            asyncio.create_task(
                checks.check(json_schema_grammar(slow_schema(n), "f"), "f", FLOOD, FLOOD)
            )
            for n in range(40)
        ]
        try:
            await until(lambda: len(asked) == NUM_CHILDREN - 1)
            other = asyncio.create_task(checks.check(small, "field", OTHER, OTHER))
            await until(lambda: small in asked)
            # Its own place was free: no compile of the flood had to end.
            assert asked.index(small) == NUM_CHILDREN - 1
            assert await other
            assert sum(task.done() for task in flood) < len(flood) // 2
        finally:
            await cancel(flood)
            await checks.close()

    run(scenario)


def test_row_54_a_grammar_that_was_too_slow_is_not_compiled_again():
    async def scenario() -> None:
        checks = GrammarChecks(CHECKPOINT, timeout_s=0.1)
        slow = json_schema_grammar(slow_schema(), "field")
        try:
            with pytest.raises(BadRequestError, match="longer than"):
                await checks.check(slow, "field", "t")
            checks._lane = FairLane("none", LaneLimits(0))  # no child can be asked any more
            with pytest.raises(BadRequestError, match="longer than"):
                await checks.check(slow, "field", "t")
        finally:
            await checks.close()

    run(scenario)


def test_row_54_a_caller_that_leaves_frees_no_place_before_its_grammar_ends():
    """Its child was ended and started again, which cost more than the grammar."""

    async def scenario() -> None:
        checks = GrammarChecks(CHECKPOINT, timeout_s=0.5)
        slow = json_schema_grammar(slow_schema(), "field")
        caller = asyncio.create_task(checks.check(slow, "field", "t", FLOOD))
        try:
            await until(lambda: checks._jobs)
            await cancel([caller])
            assert checks._lane.num_running == 1
            with pytest.raises(BadRequestError, match="longer than"):  # remembered all the same
                await checks.check(slow, "field", "t", FLOOD)
            # Two children compiled it at the same time; the abandoned one may end last.
            await until(lambda: checks._lane.num_keys == 0)
        finally:
            await checks.close()

    run(scenario)


def test_row_55_large_pictures_of_a_key_delay_another_s_by_one_decode(monkeypatch):
    """Thirty requests of sixteen pictures of 12 megapixels delayed a small picture by 29.5 s."""
    large, small = png_of_zeros(4_000, 3_000), encoded(picture())
    started: list[bytes] = []
    decode = DecoderChild.decode

    async def noting(self, data, max_tiles):
        started.append(data)
        return await decode(self, data, max_tiles)

    monkeypatch.setattr(DecoderChild, "decode", noting)

    async def scenario() -> None:
        async with DecoderPool(ImageSettings(), TILING) as pool:
            flood = [
                asyncio.create_task(pool.decode(large, None, FLOOD, is_first=False))
                for _ in range(480)
            ]
            await until(lambda: len(started) >= 2)
            before = len(started)
            assert (await pool.decode(small, None, OTHER)).num_tiles
            assert started.index(small) <= before
            await cancel(flood)

    run(scenario)


def test_row_56_slow_image_servers_hold_slots_of_their_own_key_only():
    """Every URL picture waited until the downloads of another key had run into their timeout."""

    async def scenario() -> None:
        async with site() as (port, hanging):
            fetcher = fetcher_to(port)
            slow, quick = url("/slow"), url("/quick")
            flood = [asyncio.create_task(fetcher.fetch(slow, None, FLOOD)) for _ in range(200)]
            await until(lambda: len(hanging.heads) == ImageSettings().max_concurrent_fetches // 2)
            assert await fetcher.fetch(quick, None, OTHER)
            assert not any(task.done() for task in flood)
            await cancel(flood)
            await fetcher.close()

    run(scenario)


def test_row_56_over_http_a_key_with_slow_image_servers_is_refused_and_another_is_served(tmp_path):
    settings = ServerSettings(
        model=str(write_checkpoint(tmp_path)),
        engine_socket="",
        served_model_names=[MODEL],
        api_keys=[FLOOD, OTHER],
        max_queue_wait_s=0.2,
        images=ImageSettings(max_concurrent_fetches=4),
    )
    tokenizer = meta_like_tokenizer()
    engine = ScriptedEngine(lambda request: tokens_one_by_one(tokenizer, "a boardwalk"))

    async def scenario() -> None:
        async with site() as (port, hanging):
            lane = FairLane(IMAGE_FETCHES, LaneLimits(4, max_wait_s=0.2, keeps_room=True))
            fetcher = fetcher_to(port, lane)
            async with (
                running_server(settings, engine_client=engine, fetcher=fetcher) as base,
                httpx2.AsyncClient(
                    base_url=base, timeout=CLIENT_DEADLINE_S, verify=NO_AUTHORITIES
                ) as client,
            ):
                slow, third = (asyncio.create_task(ask(client, FLOOD, "/slow")) for _ in range(2))
                await until(lambda: len(hanging.heads) == 2)
                refused = await ask(client, FLOOD, "/slow")
                assert "image fetches" in error_of(refused, 429)["message"]
                assert int(refused.headers["retry-after"]) >= 1
                assert (await ask(client, OTHER, "/quick")).status_code == 200
                await cancel([slow, third])
            await fetcher.close()

    run(scenario)


async def ask(client: httpx2.AsyncClient, key: str, path: str) -> httpx2.Response:
    image = {"type": "image_url", "image_url": {"url": f"http://pictures.example{path}"}}
    parts = [{"type": "text", "text": "What is this?"}, image]
    body = {"model": MODEL, "messages": [{"role": "user", "content": parts}]}
    return await client.post(CHAT, json=body, headers={"Authorization": f"Bearer {key}"})


@contextlib.asynccontextmanager
async def site():
    """A server with one picture at once and one that never comes."""

    async def never(reader, writer) -> None:
        await reader.read()  # until the client leaves

    pages = Site({"/slow": never, "/quick": plain_response(encoded(picture()))})
    server = await asyncio.start_server(pages, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], pages
    finally:
        server.close()


def fetcher_to(port: int, lane: FairLane | None = None) -> ImageFetcher:
    return ImageFetcher(
        ImageSettings(fetch_timeout_s=CLIENT_DEADLINE_S),
        resolver=ScriptedResolver({"pictures.example": [[PUBLIC]]}),
        connector=LoopbackConnector(port),
        ssl_context=NO_AUTHORITIES,
        lane=lane,
    )


def url(path: str) -> RemoteImage:
    return parse_remote_url(f"http://pictures.example{path}", 200)
