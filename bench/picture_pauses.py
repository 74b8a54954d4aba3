"""Measures how long pictures stop the event loops of the worker and of the engine.

    python bench/picture_pauses.py --pictures 32 --at-once 4

This process does the worker's part: it reads data URLs of `--image-size` pixels, has them decoded
and sends them, as a server does. A child does the engine's part, without a model. Tiles have 560
pixels as those of the 11B model, so a picture is 3.8 MB. A task in each loop sleeps for a
millisecond over and over. A pause is how much later it woke up. On a busy machine that is mostly
the wait for a core, so `cpu` has the CPU time of the loop's thread between two wakes.
`--pictures 0` measures an idle loop. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import uvloop

from processes import arguments, print_document
from vlmserve.models.batch import (
    ImageSpan,
    MayStart,
    ModelInfo,
    OnLaunch,
    PoolSizes,
    ScheduledSequence,
    StepBatch,
    StepResult,
    TokenMatcher,
    ignore,
    never,
)
from vlmserve.models.bundled.pictures import data_url, draw, random_scene
from vlmserve.router.client.engine_client import EngineClient
from vlmserve.router.config import EngineConfig
from vlmserve.router.engine.engine import Engine
from vlmserve.router.engine.server import EngineServer
from vlmserve.router.messages import AddRequest
from vlmserve.server.images.decoders import DecoderPool
from vlmserve.server.images.fetch import ImageFetcher
from vlmserve.server.images.loader import ImageLoader
from vlmserve.server.images.settings import ImageRequest, ImageSettings
from vlmserve.server.images.tiling import TilingConfig

TILE_SIZE, MAX_TILES = 560, 4
IDLE_S = 3.0


class Pauses:
    """The pauses of the running loop, until `stop`."""

    def __init__(self) -> None:
        self._late: list[float] = []
        self._cpu: list[float] = []
        self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            wall, cpu = time.perf_counter(), time.thread_time()
            await asyncio.sleep(0.001)
            self._late.append(time.perf_counter() - wall - 0.001)
            self._cpu.append(time.thread_time() - cpu)

    def stop(self) -> dict[str, dict[str, float]]:
        """The longest ones, in ms."""
        self._task.cancel()
        return {"pause": _longest(self._late), "cpu": _longest(self._cpu)}


def _longest(seconds: list[float]) -> dict[str, float]:
    p99, longest = np.percentile(seconds, [99, 100]) * 1e3
    return {"p99_ms": round(float(p99), 2), "max_ms": round(float(longest), 2)}


class NoModel:
    """A runner that encodes nothing and samples token 0."""

    num_layers_started = 0
    adapters = None
    info = ModelInfo(
        vocab_size=100,
        max_model_len=64,
        max_num_tiles=MAX_TILES,
        tile_size=TILE_SIZE,
        device="none",
        dtype="none",
        pools=PoolSizes(256, 64, 16),
    )

    def execute(self, batch: StepBatch, on_launch: OnLaunch = ignore) -> StepResult:
        ids = [one.request_id for one in batch.sequences if one.sampling is not None]
        return StepResult(dict.fromkeys(ids, 0))

    def prepare(self, rows: list[ScheduledSequence], may_start: MayStart = never) -> None:
        pass

    def call_between_layers(self, callback: Callable[[], None]) -> bool:
        return False

    def compile_grammar(self, grammar: str, eos_token_ids: list[int], tenant: str) -> TokenMatcher:
        raise ValueError("there is no model")


async def be_engine(path: str) -> None:
    """Serve until stdin ends; print the pauses."""
    config = EngineConfig(model="none", socket_path=path, heartbeat_interval_s=60)
    server = EngineServer(config)
    await server.start()
    engine = Engine(NoModel(), config, server.send)
    server.attach(engine)
    running = asyncio.create_task(engine.run())
    pauses = Pauses()
    await asyncio.to_thread(sys.stdin.read)
    print(json.dumps(pauses.stop()))
    running.cancel()
    await server.close()


async def be_worker(args: argparse.Namespace, path: str) -> dict[str, object]:
    """Send the pictures, so many at once; the pauses and the seconds that it took."""
    rng = np.random.default_rng(args.seed)
    size = (args.image_size, args.image_size)
    urls = [data_url(draw(random_scene(rng, size=size))) for _ in range(args.pictures)]
    settings = ImageSettings()
    client = EngineClient(path)
    await client.connect()
    await client.wait_ready()
    async with DecoderPool(settings, TilingConfig(TILE_SIZE, MAX_TILES)) as decoders:
        loader = ImageLoader(settings, ImageFetcher(settings), decoders)
        left = list(enumerate(urls))

        async def ask() -> None:
            while left:
                number, url = left.pop()
                images = await loader.load([ImageRequest(url)])
                request = AddRequest(
                    request_id=str(number),
                    prompt_token_ids=[1, 2, 3],
                    images=[*images],
                    spans=[ImageSpan(1)],
                    max_tokens=1,
                )
                async for _ in client.generate(request):
                    pass

        pauses, started = Pauses(), time.perf_counter()
        await asyncio.gather(*(ask() for _ in range(args.at_once)))
        if not urls:
            await asyncio.sleep(IDLE_S)
        seconds = time.perf_counter() - started
        found = pauses.stop()
    await client.close()
    return {"worker": found, "seconds": round(seconds, 3)}


def main() -> None:
    args = arguments(__doc__, pictures=32, at_once=4, image_size=1120, seed=0, engine="")
    if args.engine:
        uvloop.run(be_engine(args.engine))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "engine.sock")
        command = [sys.executable, __file__, "--engine", path]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as engine:
            figures = uvloop.run(be_worker(args, path))
            figures["engine"] = json.loads(engine.communicate()[0])
    print_document(args, **figures)


if __name__ == "__main__":
    main()
