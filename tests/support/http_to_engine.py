"""The HTTP side over a real socket to a real engine in the same process.

The runner hashes and every URL is a picture of two tiles. Owns the waits for a state of the
engine, and the bodies for a server that calls its model `m`.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import httpx2
from support.fake_runner import fake_image
from support.http_side import NO_AUTHORITIES, running_server
from support.invariants import body_for
from support.polling import FAR_S, LOOK_EVERY_S, until

from vlmserve.models import bundled
from vlmserve.server.settings import ServerSettings

BUNDLED = Path(bundled.__file__).parent / "checkpoint"
DEADLINE_S = FAR_S


def body(text="What shape is it?", *, images=0, **fields):
    """A request of up to 8 greedy tokens whose end of turn counts for nothing."""
    parts = [{"type": "text", "text": text}]
    parts += [{"type": "image_url", "image_url": f"picture {i}"} for i in range(images)]
    turn = {"role": "user", "content": parts}
    greedy = {"temperature": 0, "seed": 1, "max_tokens": 8, "ignore_eos": True}
    return {"model": "m", "messages": [turn]} | greedy | fields


class FakeImages:
    """Two tiles for every URL."""

    async def load(self, images, deadline=None):
        return [fake_image(image.url, 2) for image in images]


@contextlib.asynccontextmanager
async def server_at(path):
    """An HTTP server that looks for its engine at `path`; gives a client of it."""
    settings = ServerSettings(model=str(BUNDLED), engine_socket=str(path), served_model_names=["m"])
    async with (
        asyncio.timeout(DEADLINE_S),
        running_server(settings, images=FakeImages()) as url,
        httpx2.AsyncClient(base_url=url, timeout=DEADLINE_S, verify=NO_AUTHORITIES) as client,
    ):
        yield client


async def until_ready(client, status=200):
    """Wait until the server says that it is ready, or not with another status."""
    async with asyncio.timeout(FAR_S):
        while True:
            with contextlib.suppress(httpx2.TransportError):  # it does not listen yet
                if (await client.get("/v1/health/ready")).status_code == status:
                    return
            await asyncio.sleep(LOOK_EVERY_S)


async def until_running(engine):
    await until(lambda: engine.scheduler.num_running)


async def until_free(engine):
    """Wait until nothing runs, then check that every block came back."""
    await until(lambda: not engine.scheduler.has_work)
    engine.scheduler.check()
    stats = engine.stats()
    assert (stats.text_blocks_used, stats.image_blocks_used) == (0, 0)


MODEL = "m"


def body_of(route, text="Hi", **more):
    body = body_for(route, text, **more)
    return body | {"model" if "model" in body else "model_id": MODEL}
