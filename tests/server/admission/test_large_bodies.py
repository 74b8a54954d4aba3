"""Large bodies wait for threads in their key's turn, and are counted once while they are open."""

from __future__ import annotations

import asyncio
import gc
import json
import threading

import httpx2
import pytest
from support.http_side import (
    CLIENT_DEADLINE_S,
    MODEL,
    NO_AUTHORITIES,
    OneTileImages,
    ScriptedEngine,
    error_of,
    meta_like_tokenizer,
    running_app,
    tokens_one_by_one,
)
from support.polling import until

from vlmserve.server.admission.key_file import digest_of, owner_of_digest
from vlmserve.server.http.protocol import LenientRequest
from vlmserve.server.schemas.json_text import INLINE_BYTES
from vlmserve.server.settings import ServerSettings
from vlmserve.server.worker.app import build_app

CHAT = "/v1/chat/completions"
FLOOD, OTHER = "flood-key", "other-key"
OWNERS = {key: owner_of_digest(digest_of(key)) for key in (FLOOD, OTHER)}
TOKENIZER = meta_like_tokenizer()


def body_of(num_bytes: int) -> bytes:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * num_bytes}}
    parts = [{"type": "text", "text": "What is this?"}, image]
    return json.dumps({"model": MODEL, "messages": [{"role": "user", "content": parts}]}).encode()


SHORT, LONG = body_of(100), body_of(4 * INLINE_BYTES)


class Served:
    """A server with two keys in this process, and a client."""

    def __init__(self, app, client) -> None:
        self.app = app
        self.client = client
        self.threads = app.ctx.services.threads

    def post(self, key: str, body: bytes) -> asyncio.Task:
        headers = {"Authorization": f"Bearer {key}"}
        return asyncio.create_task(self.client.post(CHAT, content=body, headers=headers))


def serve(checkpoint, tmp_path, use, script=None, **settings):
    """Run `use(served)`; the flood's key has weight 1, the other 3."""
    file = tmp_path / "keys"
    file.write_text(f"{FLOOD}\n{OTHER} weight=3\n")

    async def run():
        options = ServerSettings(
            model=str(checkpoint),
            engine_socket="",
            served_model_names=[MODEL],
            api_key_file=str(file),
            **settings,
        )
        engine = ScriptedEngine(script or (lambda request: tokens_one_by_one(TOKENIZER, "a")))
        app = build_app(options, engine_client=engine, images=OneTileImages())
        async with (
            asyncio.timeout(CLIENT_DEADLINE_S),
            running_app(app) as url,
            httpx2.AsyncClient(
                base_url=url, timeout=CLIENT_DEADLINE_S, verify=NO_AUTHORITIES
            ) as client,
        ):
            await use(Served(app, client))

    asyncio.run(run())


def busy_threads(served, free: threading.Event) -> list[asyncio.Task]:
    """Work of the flood that takes every thread until `free` is set."""
    lane, count = served.threads, served.threads._limits.num_places
    return [asyncio.create_task(lane.run_in_thread(OWNERS[FLOOD], free.wait)) for _ in range(count)]


def test_large_bodies_wait_in_their_key_s_turn_and_short_ones_do_not_wait(checkpoint, tmp_path):
    """They were read in threads without a bound: 40 of one key were all before another's."""
    started = []

    async def use(served):
        run_in_thread = served.threads.run_in_thread

        async def noting(key, function, **options):
            def noted():
                started.append(key)
                return function()

            return await run_in_thread(key, noted, **options)

        served.threads.run_in_thread = noting
        free = threading.Event()
        busy = busy_threads(served, free)
        await until(lambda: served.threads.num_running == len(busy))
        started.clear()
        flood = [served.post(FLOOD, LONG) for _ in range(10)]
        await until(lambda: served.threads.num_waiting == 10)
        other = served.post(OTHER, LONG)
        await until(lambda: served.threads.num_waiting == 11)
        assert (await served.post(OTHER, SHORT)).status_code == 200
        assert started == []
        free.set()
        responses = await asyncio.gather(other, *flood)
        assert [response.status_code for response in responses] == [200] * 11
        await asyncio.gather(*busy)
        assert (served.threads.num_running, served.threads.num_keys) == (0, 0)

    serve(checkpoint, tmp_path, use)
    # Its text is checked, then read: each is next when it waits.
    other = [place for place, key in enumerate(started) if key == OWNERS[OTHER]]
    assert len(other) == 2
    assert other[1] < 6


def test_a_large_body_that_would_wait_too_long_is_a_429(checkpoint, tmp_path):
    async def use(served):
        free = threading.Event()
        busy = busy_threads(served, free)
        await until(lambda: served.threads.num_running == len(busy))
        error = error_of(await served.post(FLOOD, LONG), 429)
        assert "worker threads" in error["message"]
        free.set()
        await asyncio.gather(*busy)

    serve(checkpoint, tmp_path, use, max_queue_wait_s=0.05)


@pytest.mark.parametrize("body", [SHORT, LONG])
def test_a_body_s_strings_take_its_place_among_bytes_in_flight(checkpoint, tmp_path, body):
    """The body stayed beside its strings until the answer's end: twice what was counted."""
    seen = []
    apps = []

    def script(request):
        gc.collect()
        # Not isinstance: some libraries' objects answer it with a warning.
        requests = [one for one in gc.get_objects() if issubclass(type(one), LenientRequest)]
        bodies = [len(one.body) for one in requests if one.path == CHAT]
        seen.append((bodies, apps[0].ctx.bytes_in_flight.num_bytes))
        yield from tokens_one_by_one(TOKENIZER, "a")

    async def use(served):
        apps.append(served.app)
        assert (await served.post(OTHER, body)).status_code == 200

    serve(checkpoint, tmp_path, use, script)
    assert seen == [([0], len(body))]
    assert apps[0].ctx.bytes_in_flight.num_bytes == 0


def test_lanes_know_the_weights_of_the_key_file_also_after_a_reload(checkpoint, tmp_path):
    async def use(served):
        weight_of = served.threads._weight_of
        assert [weight_of(OWNERS[key]) for key in (FLOOD, OTHER)] == [1.0, 3.0]
        assert weight_of("") == weight_of("unknown") == 1.0
        (tmp_path / "keys").write_text(f"{FLOOD} weight=0.5\n")
        served.app.ctx.access.keys.reload()
        assert [weight_of(OWNERS[key]) for key in (FLOOD, OTHER)] == [0.5, 1.0]

    serve(checkpoint, tmp_path, use)
