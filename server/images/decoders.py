"""A pool of killable processes that turn encoded images into tiles.

Owns the children: it starts them, sends them images, kills them at a deadline and replaces them
at once. An image that crashes or hangs its decoder fails alone. Knows nothing of pixels
(`decoding.py` does, inside the children), of URLs or of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from asyncio.subprocess import PIPE, Process

import msgspec

from ...models.batch import ImageTiles
from ..child_sandbox import child_environment, end_child
from ..tasks import end_tasks, run_together
from .decoder_child import DecoderConfig
from .decoder_frames import REPLY_HEAD, REQUEST_HEAD, DecodeReply, decode_reply, reply_length
from .header import check_header, read_header
from .settings import ImageError, ImageSettings, PoolClosed
from .tiling import TilingConfig

logger = logging.getLogger(__name__)

MODULE = "vlmserve.server.images.decoder_child"
START_TIMEOUT_S = 60.0
RESTART_PAUSE_S = 1.0
STREAM_LIMIT = 4 * 1024 * 1024
CRASHED = "image cannot be decoded: it crashed the decoder"


class DecoderLost(Exception):
    """A child ended, or sent an invalid frame."""


class DecoderChild:
    """One decoder process and its pipes, for one image at a time."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, config: DecoderConfig) -> DecoderChild:
        """A child that is ready for images. Raises DecoderLost if it ends before."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-W", "ignore", "-m", MODULE),
            msgspec.json.encode(config).decode(),
            stdin=PIPE, stdout=PIPE, limit=STREAM_LIMIT, env=child_environment(),
        )  # fmt: skip
        child = cls(process)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await child._read_reply()
        except BaseException as error:
            await child.kill()
            if isinstance(error, TimeoutError):
                raise DecoderLost("a decoder did not start in time") from None
            raise
        return child

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.returncode is None

    async def decode(self, data: bytes, max_tiles: int | None) -> DecodeReply:
        """The child's reply to one image. Raises DecoderLost if the child ends instead."""
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(REQUEST_HEAD.pack(max_tiles or 0, len(data)))
            stdin.write(data)
            await stdin.drain()
        except (ConnectionError, RuntimeError) as error:
            raise DecoderLost("a decoder closed its stdin") from error
        return await self._read_reply()

    async def kill(self) -> None:
        """Kill and reap the process. Does nothing if it has ended."""
        await end_child(self._process)

    async def _read_reply(self) -> DecodeReply:
        stdout = self._process.stdout
        assert stdout is not None
        try:
            length = reply_length(await stdout.readexactly(REPLY_HEAD.size))
            return decode_reply(await stdout.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise DecoderLost("a decoder ended") from error
        except (ValueError, msgspec.MsgspecError) as error:
            raise DecoderLost("a decoder sent an invalid frame") from error


class DecoderPool:
    """At least two decoder children, each of which decodes one image at a time.

    Open it before use and close it afterwards, in the same event loop, or use it as an async
    context manager.
    """

    def __init__(self, settings: ImageSettings, tiling: TilingConfig) -> None:
        self._settings = settings
        self._config = DecoderConfig(settings, tiling, os.getpid())
        self._children: set[DecoderChild] = set()
        # None means that the pool is closed. Each waiting task that takes it returns it.
        self._idle: asyncio.LifoQueue[DecoderChild | None] = asyncio.LifoQueue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._jobs: set[asyncio.Task[DecodeReply]] = set()
        self._is_closed = False

    async def open(self) -> None:
        """Start all children and wait until they are ready. Raises DecoderLost if one fails."""
        starts = [self._add_child() for _ in range(self._settings.num_decoders)]
        try:
            await run_together(starts)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Kill all children; images that are being decoded fail."""
        self._is_closed = True
        self._idle.put_nowait(None)
        await end_tasks(*self._tasks, *self._jobs)
        children, self._children = self._children, set()
        await asyncio.gather(*(child.kill() for child in children))

    async def __aenter__(self) -> DecoderPool:
        await self.open()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    @property
    def pids(self) -> list[int]:
        """The process ids of the running children."""
        return sorted(child.pid for child in self._children if child.is_alive)

    @property
    def num_busy(self) -> int:
        """How many images the children are decoding."""
        return len(self._jobs)

    async def decode(self, data: bytes, max_tiles: int | None = None) -> ImageTiles:
        """The tiles of one encoded image, as soon as a child is free.

        Raises ImageError if the image is rejected, damaged, crashes its decoder or takes longer
        than decode_timeout_s. If the caller is cancelled, the child finishes its image (within
        that time), so that requests and replies in its pipes stay paired.
        """
        check_header(read_header(data), self._settings)
        child = await self._take_idle()
        job = asyncio.create_task(self._run(child, data, max_tiles))
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        reply = await self._wait_for(job)
        if reply.tiles is None:
            raise ImageError(reply.error or CRASHED)
        return reply.tiles

    async def _wait_for(self, job: asyncio.Task[DecodeReply]) -> DecodeReply:
        """The job's reply. If the caller is cancelled, the job continues."""
        try:
            return await asyncio.shield(job)
        except asyncio.CancelledError:
            if job.cancelled():
                raise PoolClosed from None
            raise

    async def _take_idle(self) -> DecoderChild:
        """A child that is ready. A child that died while idle is replaced."""
        while (child := await self._idle.get()) is not None:
            if child.is_alive:
                return child
            self._replace(child)
        self._idle.put_nowait(None)
        raise PoolClosed

    async def _run(self, child: DecoderChild, data: bytes, max_tiles: int | None) -> DecodeReply:
        """Decode one image in one child, which becomes idle again or is replaced."""
        timeout_s = self._settings.decode_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                reply = await child.decode(data, max_tiles)
        except TimeoutError:
            self._replace(child)
            return DecodeReply(error=f"image takes over {timeout_s:g} s to decode: scale it down")
        except DecoderLost:
            self._replace(child)
            return DecodeReply(error=CRASHED)
        except BaseException:
            self._replace(child)
            raise
        self._idle.put_nowait(child)
        return reply

    def _replace(self, child: DecoderChild) -> None:
        """Kill a child and start another in its place, in the background."""
        if self._is_closed:
            return
        logger.warning("replacing image decoder %d", child.pid)
        task = asyncio.create_task(self._kill_and_add(child))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _kill_and_add(self, child: DecoderChild) -> None:
        await child.kill()
        self._children.discard(child)
        while not self._is_closed:
            try:
                return await self._add_child()
            except (DecoderLost, OSError) as error:
                logger.error("cannot start an image decoder: %s", error)
                await asyncio.sleep(RESTART_PAUSE_S)

    async def _add_child(self) -> None:
        child = await DecoderChild.start(self._config)
        self._children.add(child)
        self._idle.put_nowait(child)
