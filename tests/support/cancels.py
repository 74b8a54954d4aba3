"""Many clients that leave one server at once, at the same stage of their requests.

The HTTP side and the engine are the real ones, in this process, over real sockets; the runner
hashes and the pictures' loader waits where it is told to, so that every request of a round
is at its stage when its client leaves. Owns the rounds and what must be free after each.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from support.engine_side import engine_at
from support.fake_runner import OrdinaryRunner, fake_image, fake_info
from support.http_side import running_server
from support.http_to_engine import until_ready
from support.invariants import CHAT, body_for, raw_post
from support.polling import until
from support.step_gate import StepGate

from vlmserve.models.batch import ImageTiles, PoolSizes
from vlmserve.models.bundled import CHECKPOINT
from vlmserve.server.images.settings import ImageRequest
from vlmserve.server.settings import ServerSettings

STAGES = ("queued", "fetching", "decoding", "prefill", "stream", "plain")
ROUND_S = 120.0
FREED_S = 0.1


class WaitingImages:
    """Loads pictures at once, but for those whose URL names a stage: they never come."""

    def __init__(self) -> None:
        self.num_waiting: Counter[str] = Counter()

    async def load(
        self, images: Sequence[ImageRequest], deadline: float | None = None
    ) -> list[ImageTiles]:
        for image in images:
            stage = image.url.partition(" ")[0]
            if stage in ("fetching", "decoding"):
                self.num_waiting[stage] += 1
                try:
                    await asyncio.Event().wait()
                finally:
                    self.num_waiting[stage] -= 1
        return [fake_image(image.url, 2) for image in images]


@dataclass
class Report:
    """freed_s: from the departure of a round's clients to the last thing freed, a round each."""

    left: Counter[str] = field(default_factory=Counter)
    freed_s: list[float] = field(default_factory=list)
    descriptors: tuple[int, int] = (0, 0)


class Cancels:
    """One server, to be used as `async with`; `round` after `round`, then `report`."""

    def __init__(self, folder: Path, size: int = 32) -> None:
        self.report = Report()
        self._size = size
        self._gate = StepGate()
        self._gate.open()
        pools = PoolSizes(num_text_blocks=4096, num_image_blocks=512, block_size=16)
        self._runner = OrdinaryRunner(fake_info(pools, 4096), before_step=self._gate)
        self._images = WaitingImages()
        self._path = folder / "engine.sock"
        self._stack = AsyncExitStack()
        self._number = 0

    async def __aenter__(self) -> Cancels:
        options = {"max_num_seqs": self._size, "max_num_batched_images": self._size}
        enter = self._stack.enter_async_context
        self.engine = await enter(engine_at(self._path, self._runner, **options))
        settings = ServerSettings(
            model=str(CHECKPOINT),
            engine_socket=str(self._path),
            served_model_names=["vlmserve-tiny-vision"],
            log_requests=False,
        )
        self._url = await enter(running_server(settings, images=self._images))
        async with httpx2.AsyncClient(base_url=self._url) as client:
            await until_ready(client)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._gate.open()
        await self._stack.aclose()

    async def run(self, count: int) -> Report:
        """Rounds over all stages until `count` clients have left."""
        for stage in STAGES:  # what grows at first use has grown
            await self.round(stage)
        before = num_descriptors()
        self.report = Report()
        number = 0
        while self.report.left.total() < count:
            await self.round(STAGES[number % len(STAGES)])
            number += 1
        self.report.descriptors = before, num_descriptors()
        return self.report

    async def round(self, stage: str) -> None:
        """A crowd comes, reaches the stage and leaves; everything is free in time."""
        async with asyncio.timeout(ROUND_S):
            if stage in ("queued", "prefill"):
                self._gate.shut()
            holder = await self._hold() if stage == "queued" else None
            crowd = await asyncio.gather(*(self._send(stage) for _ in range(self._size)))
            await until(lambda: self._is_reached(stage))
            if stage == "stream":
                await asyncio.gather(*(_two_frames(reader) for reader, _ in crowd))
            left = time.monotonic()
            for _, writer in crowd:
                writer.transport.abort()
            if stage == "queued":
                await until(lambda: self.engine.stats().num_waiting == 0)
                self.report.freed_s.append(time.monotonic() - left)
            if stage == "prefill":
                # The step that computes them is the last: what is freed is free right after it.
                await until(lambda: self._num_aborted() == self._size)
                left = time.monotonic()
            if holder is not None:
                holder.transport.abort()
            self._gate.open()
            await until(self._is_free)
            if stage != "queued":
                self.report.freed_s.append(time.monotonic() - left)
        self.engine.scheduler.check()
        self.report.left[stage] += self._size

    async def _hold(self) -> asyncio.StreamWriter:
        """One request in a step that waits, behind which all others are queued."""
        _, writer = await self._send("plain")
        await until(lambda: self._gate.num_sequences == 1)
        return writer

    async def _send(self, stage: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        self._number += 1
        images = []
        if stage in ("fetching", "decoding"):
            images = [f"{stage} {self._number}"]
        elif self._number % 2:
            images = [f"picture {self._number % 100}"]
        text = "What? " * (20 if stage == "prefill" else 1)
        more = {"ignore_eos": True, "stream": stage == "stream"}
        body = body_for(CHAT, text, images=images, max_tokens=2000, **more)
        port = int(self._url.rsplit(":", 1)[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(raw_post(CHAT, body))
        return reader, writer

    def _is_reached(self, stage: str) -> bool:
        stats = self.engine.stats()
        if stage in ("fetching", "decoding"):
            return self._images.num_waiting[stage] == self._size
        if stage == "queued":
            return stats.num_waiting == self._size
        if stage == "prefill":
            # Those who came after the step was planned wait for the next.
            return stats.num_waiting + stats.num_running == self._size
        return stats.num_running == self._size

    def _num_aborted(self) -> int:
        """How many of a crowd are gone, or go with the step that is being computed."""
        engine = self.engine.snapshot()
        return self._size - len(engine.open) + engine.num_aborting

    def _is_free(self) -> bool:
        stats = self.engine.stats()
        held = (stats.num_running, stats.num_waiting, stats.text_blocks_used)
        return not any(held) and not stats.image_blocks_used and not self.engine.snapshot().open


async def _two_frames(reader: asyncio.StreamReader) -> None:
    for _ in range(2):
        await reader.readuntil(b"data: ")


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def figures(report: Report) -> dict[str, Any]:
    """The report as one JSON object."""
    ordered = sorted(report.freed_s)
    return {
        "part": "cancels, engine and HTTP side in one process, fake runner",
        "cancels": report.left.total(),
        "stages": dict(report.left),
        "freed_s_p99": round(ordered[int(len(ordered) * 0.99)], 4),
        "freed_s_max": round(ordered[-1], 4),
        "descriptors": report.descriptors,
    }
