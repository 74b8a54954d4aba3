"""Checks in child processes whether a client's grammar compiles.

Owns the children, their lane and deadlines, and a bounded cache of their verdicts. A child counts
its own processor time, so a busy machine makes no grammar too slow. Knows nothing of the meaning
of a grammar.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import signal
from asyncio.subprocess import PIPE, Process
from collections import OrderedDict
from pathlib import Path

import msgspec

from ...router.processes.tasks import end_tasks
from ..admission.fair_lane import FairLane, LaneLimits, Place
from ..admission.lanes import GRAMMARS
from ..children.processes import ChildStartError, child_environment, end_child, start_python
from ..children.questions import LENGTH_BYTES, question_frame
from ..errors import BadRequestError, NotReadyError
from .reasons import Verdict

logger = logging.getLogger(__name__)

MODULE = "vlmserve.server.structured_output.compile_child"
# Of which one key gets two: the third is started when another key comes meanwhile.
NUM_CHILDREN = 3
START_TIMEOUT_S = 60.0
# Wall time of a compile in terms of its processor time: beyond it the machine is at fault.
WALL_FACTOR = 15
# A verdict includes a grammar of 64 KiB or a little more: about 20 MiB in all.
MAX_VERDICTS = 256
TOO_MUCH_MEMORY = "it takes too much memory to compile: simplify it"
_ANSWER_LIMIT = 1 << 20
_LOST = (asyncio.IncompleteReadError, ConnectionError, msgspec.DecodeError)
# Signals that end a child because of the grammar: its timer, and a failed allocation.
_TOO_SLOW, _OUT_OF_MEMORY = -signal.SIGPROF, -signal.SIGABRT


class _UnsupportedError(Exception):
    """The tokenizer supports no grammars. The message has the reason."""


class GrammarChecks:
    """At most NUM_CHILDREN children, started when the first grammars come.

    lane: the queue for compilation, with NUM_CHILDREN places.
    """

    def __init__(
        self, folder: str | Path, timeout_s: float = 2.0, lane: FairLane | None = None
    ) -> None:
        """folder: the checkpoint's, for its tokenizer. timeout_s: of processor time."""
        self._folder = str(folder)
        self._timeout_s = timeout_s
        self._lane = lane or FairLane(GRAMMARS, LaneLimits(NUM_CHILDREN, keeps_room=True))
        self._idle: list[Process] = []
        self._jobs: set[asyncio.Task[Verdict]] = set()
        self._spare: asyncio.Task[None] | None = None
        self._verdicts: OrderedDict[tuple[str, bytes], Verdict] = OrderedDict()
        self._unsupported: str | None = None  # known when a child has read the tokenizer

    async def check(self, grammar: str, field: str, tenant: str, owner: str = "") -> str:
        """The grammar as the engine takes it. Raises BadRequestError, naming `field`.

        owner: the key that waits in the lane. The cache is separate for each `tenant`, so response
        times reveal nothing of other tenants.
        Raises OverloadedError if the lane refuses, NotReadyError if the machine was too slow.
        """
        key = (tenant, hashlib.sha256(grammar.encode()).digest())
        try:
            if self._unsupported is not None:
                raise _UnsupportedError(self._unsupported)
            verdict = self._verdicts.get(key) or await self._judge(grammar, key, owner)
        except _UnsupportedError as error:
            raise BadRequestError(
                f"{field} cannot be used with this model: {error}; remove it", param=field
            ) from None
        if verdict.grammar is None:
            raise BadRequestError(f"{field} cannot be compiled: {verdict.error}", param=field)
        return verdict.grammar

    async def close(self) -> None:
        """Stop the children."""
        await end_tasks(*self._jobs, *([] if self._spare is None else [self._spare]))
        idle, self._idle = self._idle, []
        for process in idle:
            await end_child(process)

    async def _judge(self, grammar: str, key: tuple[str, bytes], owner: str) -> Verdict:
        """The verdict of a child. If the caller is cancelled, the child finishes the grammar.

        Ending the child instead would let one key cost a start of a child with each cancel.
        """
        place = await self._lane.take(owner)
        job = asyncio.create_task(self._run(grammar, key))
        self._jobs.add(job)
        job.add_done_callback(lambda done: self._end(done, place))
        try:
            return await asyncio.shield(job)
        finally:
            del job  # a failure refers to this frame: no cycle

    def _end(self, job: asyncio.Task[Verdict], place: Place) -> None:
        self._jobs.discard(job)
        place.free()
        if not job.cancelled():
            job.exception()  # it may have no caller any more

    async def _run(self, grammar: str, key: tuple[str, bytes]) -> Verdict:
        known = self._verdicts.get(key)  # a request before this one may have had the same
        verdict = self._verdicts[key] = known or await self._ask_child(grammar)
        self._verdicts.move_to_end(key)
        while len(self._verdicts) > MAX_VERDICTS:
            self._verdicts.popitem(last=False)
        return verdict

    async def _ask_child(self, grammar: str) -> Verdict:
        """A child's verdict, or that the grammar ended it. The machine's faults are errors."""
        process = await self._take_child()
        try:
            async with asyncio.timeout(WALL_FACTOR * self._timeout_s):
                verdict = await _ask(process, grammar.encode(), self._timeout_s)
        except TimeoutError:
            await self._end_child(process)
            raise _lost_child() from None
        except _LOST:
            with contextlib.suppress(TimeoutError):  # of the signal that ended it, the exit code
                await asyncio.wait_for(process.wait(), 1.0)
            await self._end_child(process)
            return self._fatal(process.returncode)
        except BaseException:
            await end_child(process)
            raise
        self._idle.append(process)
        return verdict

    def _fatal(self, exit_code: int | None) -> Verdict:
        """Why a grammar ended its child. Raises NotReadyError if the grammar did not."""
        if exit_code == _TOO_SLOW:
            return Verdict(
                error=f"it takes longer than {self._timeout_s:g} s to compile: simplify it"
            )
        if exit_code == _OUT_OF_MEMORY:
            return Verdict(error=TOO_MUCH_MEMORY)
        raise _lost_child()

    async def _end_child(self, process: Process) -> None:
        """End an unusable child, and start the next one before a request waits for it."""
        await end_child(process)
        if self._spare is None or self._spare.done():
            self._spare = asyncio.create_task(self._add_spare())

    async def _add_spare(self) -> None:
        with contextlib.suppress(
            NotReadyError, _UnsupportedError
        ):  # the next request starts its own
            self._idle.append(await self._start())

    async def _take_child(self) -> Process:
        """An idle child, the one that is being started to replace a dead one, or a new one."""
        while (process := await self._take_idle()) is None:
            if self._spare is None:
                return await self._start()
            # Taken by this job alone: NUM_CHILDREN is never exceeded.
            spare, self._spare = self._spare, None
            await spare
        return process

    async def _take_idle(self) -> Process | None:
        """An idle child that is still alive, or None."""
        while self._idle:
            process = self._idle.pop()
            if process.returncode is None:
                return process
            await end_child(process)
        return None

    async def _start(self) -> Process:
        """Start a child and wait until it has read the tokenizer.

        Raises NotReadyError, or _UnsupportedError if the tokenizer supports no grammars.
        """
        try:
            process = await start_python(
                ("-P", "-W", "ignore", "-m", MODULE, str(os.getpid()), self._folder),
                child_environment(), stdout=PIPE, limit=_ANSWER_LIMIT,
            )  # fmt: skip
        except ChildStartError as error:
            logger.error("cannot start a process that checks grammars: %s", error)
            raise _lost_child() from None
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                self._unsupported = (await _read(process)).error
        except (TimeoutError, *_LOST):
            await end_child(process)
            logger.error("a process that checks grammars ended at its start")
            raise _lost_child() from None
        except BaseException:
            await end_child(process)
            raise
        if self._unsupported is not None:
            await end_child(process)
            raise _UnsupportedError(self._unsupported)
        return process


async def _ask(process: Process, question: bytes, timeout_s: float) -> Verdict:
    assert process.stdin is not None
    process.stdin.write(question_frame(question, timeout_s))
    await process.stdin.drain()
    return await _read(process)


async def _read(process: Process) -> Verdict:
    assert process.stdout is not None
    length = int.from_bytes(await process.stdout.readexactly(LENGTH_BYTES), "big")
    return msgspec.json.decode(await process.stdout.readexactly(length), type=Verdict)


def _lost_child() -> NotReadyError:
    return NotReadyError(
        "the grammar could not be checked now: the server is short of processor time or memory",
        retry_after_s=1.0,
    )
