"""Checks in child processes whether a client's grammar compiles.

Owns the children, their deadline, and a bounded cache of their verdicts. Knows nothing of the
meaning of a grammar.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections import OrderedDict
from pathlib import Path

import msgspec

from ..child_sandbox import child_environment, end_child
from ..errors import BadRequestError, InternalError
from .compile_child import LENGTH_BYTES, Verdict

MODULE = "vlmserve.server.structured_output.compile_child"
NUM_CHILDREN = 2
START_TIMEOUT_S = 60.0
# A verdict holds a grammar of 64 KiB or a little more: some 20 MiB at most.
MAX_VERDICTS = 256
_ANSWER_LIMIT = 1 << 20
_LOST = (asyncio.IncompleteReadError, ConnectionError, msgspec.DecodeError)


class GrammarChecks:
    """At most two children, started when the first grammars come."""

    def __init__(self, folder: str | Path, timeout_s: float = 2.0) -> None:
        """folder: the checkpoint's, for its tokenizer."""
        self._folder = str(folder)
        self._timeout_s = timeout_s
        self._free = asyncio.Semaphore(NUM_CHILDREN)
        self._idle: list[Process] = []
        self._verdicts: OrderedDict[tuple[str, bytes], Verdict] = OrderedDict()

    async def check(self, grammar: str, field: str, tenant: str) -> str:
        """The grammar as the engine takes it. Raises BadRequestError, naming `field`.

        The cache is separate for each `tenant`, so response times reveal nothing of other tenants.
        """
        key = (tenant, hashlib.sha256(grammar.encode()).digest())
        verdict = self._verdicts.get(key)
        if verdict is None:
            verdict = self._verdicts[key] = await self._judge(grammar, field)
            while len(self._verdicts) > MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        self._verdicts.move_to_end(key)
        if verdict.grammar is None:
            raise BadRequestError(f"{field} cannot be compiled: {verdict.error}", param=field)
        return verdict.grammar

    async def close(self) -> None:
        """Stop the idle children."""
        idle, self._idle = self._idle, []
        for process in idle:
            await end_child(process)

    async def _judge(self, grammar: str, field: str) -> Verdict:
        """The verdict of a child. Timeouts are not cached, because the machine may be busy."""
        async with self._free:
            process = await self._take_idle() or await self._start()
            try:
                async with asyncio.timeout(self._timeout_s):
                    verdict = await _ask(process, grammar.encode())
            except TimeoutError:
                await end_child(process)
                raise BadRequestError(
                    f"{field} takes longer than {self._timeout_s:g} s to compile: simplify it",
                    param=field,
                ) from None
            except _LOST:
                await end_child(process)
                raise BadRequestError(
                    f"{field} takes too much memory to compile: simplify it", param=field
                ) from None
            except BaseException:
                await end_child(process)
                raise
            self._idle.append(process)
            return verdict

    async def _take_idle(self) -> Process | None:
        """An idle child that is still alive, or None."""
        while self._idle:
            process = self._idle.pop()
            if process.returncode is None:
                return process
            await end_child(process)
        return None

    async def _start(self) -> Process:
        """Start a child and wait until it has read the tokenizer."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-W", "ignore", "-m", MODULE, str(os.getpid()), self._folder),
            stdin=PIPE, stdout=PIPE, limit=_ANSWER_LIMIT, env=child_environment(),
        )  # fmt: skip
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await _read(process)
        except (TimeoutError, *_LOST) as error:
            await end_child(process)
            raise InternalError(
                "grammars cannot be checked: their process did not start"
            ) from error
        except BaseException:
            await end_child(process)
            raise
        return process


async def _ask(process: Process, question: bytes) -> Verdict:
    assert process.stdin is not None
    process.stdin.write(len(question).to_bytes(LENGTH_BYTES, "big") + question)
    await process.stdin.drain()
    return await _read(process)


async def _read(process: Process) -> Verdict:
    assert process.stdout is not None
    length = int.from_bytes(await process.stdout.readexactly(LENGTH_BYTES), "big")
    return msgspec.json.decode(await process.stdout.readexactly(length), type=Verdict)
