"""A pool of killable processes that turn encoded images into tiles.

Owns the children: it starts them, sends them images, kills them at a deadline and replaces them
at once. An image that crashes or hangs its decoder fails alone. Decides whose fault a failure is:
the image's if it is damaged, crashes the decoder or takes too much CPU time; the server's if the
decoder got no CPU time or the system killed it. Knows nothing of pixels (`decoding.py` does, inside
the children), of URLs or of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import msgspec

from ...models.batch import ImageTiles
from ...router.processes.tasks import end_tasks, run_together
from ..admission.fair_lane import FairLane, LaneLimits
from ..admission.lanes import IMAGE_DECODERS
from ..children.processes import ChildStartError, child_environment, end_child, start_python
from ..errors import NotReadyError
from .decoder_frames import (
    MAX_REPLY_BYTES,
    PIECE_BYTES,
    REPLY_HEAD,
    REQUEST_HEAD,
    DecoderConfig,
    DecodeReply,
    ReplyHead,
)
from .header import check_header, read_header
from .settings import ImageError, ImageSettings, PoolClosed
from .tiling import TilingConfig

logger = logging.getLogger(__name__)

MODULE = "vlmserve.server.images.decoder_child"
START_TIMEOUT_S = 60.0
RESTART_PAUSE_S = 1.0
STREAM_LIMIT = 4 * 1024 * 1024
# An image may take this many times decode_timeout_s of real time: its decoder may have to wait for
# a core. After that, the decoder is replaced.
WAIT_FACTOR = 4
CHECK_INTERVAL_S = 0.05
EXIT_TIMEOUT_S = 5.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
CRASHED = "image cannot be decoded: it crashed the decoder"
# What an image can do to its decoder. Any other end is the system's doing.
CRASH_SIGNALS = frozenset(
    {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
)


class DecoderLost(Exception):
    """A child ended, or sent an invalid frame."""


class TooMuchCpu(Exception):
    """An image took all the CPU time that it may take."""


class DecoderStalled(Exception):
    """A child got too little CPU time for its image."""


class DecoderChild:
    """One decoder process and its pipes, for one image at a time."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, config: DecoderConfig) -> DecoderChild:
        """A child that is ready for images. Raises DecoderLost or ChildStartError."""
        process = await start_python(
            ("-P", "-W", "ignore", "-m", MODULE, msgspec.json.encode(config).decode()),
            child_environment(), stdout=PIPE, limit=STREAM_LIMIT,
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

    @property
    def cpu_s(self) -> float:
        """The CPU seconds that the process has used; 0 if it is gone."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text("ascii", "replace")
        except OSError:
            return 0.0
        # The name before the last bracket may contain anything. utime and stime: proc(5).
        fields = stat.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

    async def exit_signal(self) -> int | None:
        """The signal that ended the process; None if it exited or did not end."""
        try:
            async with asyncio.timeout(EXIT_TIMEOUT_S):
                code = await self._process.wait()
        except TimeoutError:
            return None
        return -code if code < 0 else None

    async def decode_within(
        self, data: bytes, max_tiles: int | None, cpu_s: float, real_s: float
    ) -> DecodeReply:
        """As `decode`. Raises TooMuchCpu or DecoderStalled when the first of both is used up."""
        loop = asyncio.get_running_loop()
        last_cpu_s, deadline = self.cpu_s + cpu_s, loop.time() + real_s
        decoding = asyncio.create_task(self.decode(data, max_tiles))
        try:
            while not decoding.done():
                left_s = min(last_cpu_s - self.cpu_s, deadline - loop.time())
                await asyncio.wait({decoding}, timeout=max(left_s, CHECK_INTERVAL_S))
                if not decoding.done() and self.cpu_s >= last_cpu_s:
                    raise TooMuchCpu
                if not decoding.done() and loop.time() >= deadline:
                    raise DecoderStalled
            return await decoding
        finally:
            await end_tasks(decoding)
            del decoding

    async def decode(self, data: bytes, max_tiles: int | None) -> DecodeReply:
        """The child's reply to one image. Raises DecoderLost if the child ends instead."""
        stdin = self._process.stdin
        assert stdin is not None
        try:
            await write_request(stdin, data, max_tiles)
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
            return await read_reply(stdout)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise DecoderLost("a decoder ended") from error
        except (ValueError, msgspec.MsgspecError) as error:
            raise DecoderLost("a decoder sent an invalid frame") from error


class DecoderPool:
    """At least two decoder children, each of which decodes one image at a time.

    Open it before use and close it afterwards, in the same event loop, or use it as an async
    context manager. lane: which key decodes next, with num_decoders places.
    """

    def __init__(
        self, settings: ImageSettings, tiling: TilingConfig, lane: FairLane | None = None
    ) -> None:
        self._settings = settings
        self._lane = lane or FairLane(IMAGE_DECODERS, LaneLimits(settings.num_decoders))
        self._config = DecoderConfig(settings, tiling, os.getpid())
        self._children: set[DecoderChild] = set()
        # None means that the pool is closed. Each waiting task that takes it returns it.
        self._idle: asyncio.LifoQueue[DecoderChild | None] = asyncio.LifoQueue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._jobs: set[asyncio.Task[DecodeReply | None]] = set()
        self._is_closed = False

    async def open(self) -> None:
        """Start all children and wait for them. Raises DecoderLost or ChildStartError."""
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

    async def decode(
        self,
        data: bytes,
        max_tiles: int | None = None,
        owner: str = "",
        *,
        is_first: bool = True,
    ) -> ImageTiles:
        """The tiles of one encoded image, as soon as a child is free and it is `owner`'s turn.

        is_first: of its request; the lane refuses only that one for the length of its wait.

        Raises ImageError if the image is rejected, damaged, crashes its decoder or takes more CPU
        time than decode_timeout_s; OverloadedError if the lane refuses; NotReadyError if the
        decoder got no CPU time or the system killed it. If the caller is cancelled, the child
        finishes its image (within the same limits), so that requests and replies in its pipes stay
        paired.
        """
        check_header(read_header(data), self._settings)
        place = await self._lane.take(owner, is_bounded=is_first)
        try:
            child = await self._take_idle()
        except BaseException:
            place.free()
            raise
        job = asyncio.create_task(self._run(child, data, max_tiles))
        job.add_done_callback(lambda done: place.free())
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        reply = await self._wait_for(job)
        if reply is None:
            raise NotReadyError("an image decoder was interrupted: try again", retry_after_s=1.0)
        if reply.tiles is None:
            raise ImageError(reply.error or CRASHED)
        return reply.tiles

    async def _wait_for(self, job: asyncio.Task[DecodeReply | None]) -> DecodeReply | None:
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

    async def _run(
        self, child: DecoderChild, data: bytes, max_tiles: int | None
    ) -> DecodeReply | None:
        """Decode one image in one child, which becomes idle again or is replaced.

        None: the decoder failed, and the image is not at fault.
        """
        limit_s = self._settings.decode_timeout_s
        try:
            reply = await child.decode_within(data, max_tiles, limit_s, WAIT_FACTOR * limit_s)
        except BaseException as error:
            fault = await _fault_of(error, child, limit_s)
            self._replace(child)
            if isinstance(error, (TooMuchCpu, DecoderStalled, DecoderLost)):
                return fault
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
            except (DecoderLost, ChildStartError) as error:
                logger.error("cannot start an image decoder: %s", error)
                await asyncio.sleep(RESTART_PAUSE_S)

    async def _add_child(self) -> None:
        child = await DecoderChild.start(self._config)
        self._children.add(child)
        self._idle.put_nowait(child)


async def _fault_of(
    error: BaseException, child: DecoderChild, limit_s: float
) -> DecodeReply | None:
    """The reply to an image that is at fault for the failure; None if it is not."""
    if isinstance(error, DecoderLost):
        ended_by = await child.exit_signal()
        if ended_by in CRASH_SIGNALS:
            return DecodeReply(error=CRASHED)
        is_too_slow = ended_by == signal.SIGXCPU
    else:
        is_too_slow = isinstance(error, TooMuchCpu)
    if is_too_slow:
        return DecodeReply(error=f"image takes over {limit_s:g} s of CPU time: scale it down")
    return None


# Each of these lets the event loop run between two pieces: no turn copies a whole picture.


async def read_reply(reader: asyncio.StreamReader) -> DecodeReply:
    """The next reply. Raises IncompleteReadError at the end of the stream.

    Raises ValueError or msgspec.DecodeError if it is invalid.
    """
    length, num_tile_bytes = REPLY_HEAD.unpack(await reader.readexactly(REPLY_HEAD.size))
    if length + num_tile_bytes > MAX_REPLY_BYTES:
        raise ValueError(
            f"a decoder's reply of {length + num_tile_bytes} bytes is over {MAX_REPLY_BYTES}"
        )
    head = msgspec.msgpack.decode(await _read(reader, length), type=ReplyHead)
    data = await _read(reader, num_tile_bytes)
    if head.image is None:
        return DecodeReply(error=head.error)
    if len(data) != head.image.num_bytes:
        raise ValueError(f"{len(data)} bytes of an image of {head.image.num_bytes}")
    return DecodeReply(ImageTiles.of(head.image, data))


async def write_request(writer: asyncio.StreamWriter, data: bytes, max_tiles: int | None) -> None:
    """Send one encoded file. Raises ConnectionError or RuntimeError if the child is gone."""
    writer.write(REQUEST_HEAD.pack(max_tiles or 0, len(data)))
    view = memoryview(data)
    for offset in range(0, len(data), PIECE_BYTES):
        writer.write(bytes(view[offset : offset + PIECE_BYTES]))
        await writer.drain()
        await asyncio.sleep(0)  # also if the pipe took all of it


async def _read(reader: asyncio.StreamReader, num_bytes: int) -> bytearray:
    data = bytearray()
    while len(data) < num_bytes:
        data += await reader.readexactly(min(PIECE_BYTES, num_bytes - len(data)))
        await asyncio.sleep(0)  # also if more of it is here already
    return data
