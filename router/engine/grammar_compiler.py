"""Compiles grammars while their requests wait.

Owns the thread that compiles, and which answers wait for it. Knows nothing of queues, of steps or
of what a grammar means.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ...models.batch import TokenMatcher
from ..errors import EngineError, EngineInternalError, InvalidRequestError
from ..messages import AddRequest
from ..scheduler.sequence import Sequence

logger = logging.getLogger("vlmserve.engine")

CompileGrammar = Callable[[str, list[int], str], TokenMatcher]
OnDone = Callable[[list[Sequence], TokenMatcher | EngineError], None]


@dataclass(slots=True)
class _Job:
    """One request's grammar: the answers that wait for it, and the task that compiles it."""

    sequences: list[Sequence]
    task: asyncio.Task[None]


class GrammarCompiler:
    """Compiles one grammar at a time, first in, first out, in its own thread.

    on_done: called on the loop with the answers of a request that still wait, and either a matcher
    at the grammar's start, which each answer must copy, or an error.
    """

    def __init__(self, compile_grammar: CompileGrammar, on_done: OnDone) -> None:
        self._compile_grammar = compile_grammar
        self._on_done = on_done
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._jobs: dict[Sequence, _Job] = {}

    def start(self, request: AddRequest, sequences: list[Sequence]) -> None:
        """Compile the grammar of `request`, whose answers are `sequences`."""
        task = asyncio.create_task(self._run(request, sequences), name="grammar")
        job = _Job(list(sequences), task)
        self._jobs |= dict.fromkeys(sequences, job)

    def leave(self, sequence: Sequence) -> None:
        """Remove an answer that ended. Cancels the compilation if it was the last one."""
        job = self._jobs.pop(sequence, None)
        if job is not None:
            job.sequences.remove(sequence)
            if not job.sequences:
                job.task.cancel()

    def close(self) -> None:
        """Cancel all compilations."""
        for job in self._jobs.values():
            job.task.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _run(self, request: AddRequest, sequences: list[Sequence]) -> None:
        result = await self._result(request)
        # Nothing is awaited from here on, so no answer can end in between.
        waiting = [sequence for sequence in sequences if self._jobs.pop(sequence, None) is not None]
        self._on_done(waiting, result)

    async def _result(self, request: AddRequest) -> TokenMatcher | EngineError:
        assert request.grammar is not None, "the request has no grammar"
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(
                self._executor,
                self._compile_grammar,
                request.grammar,
                request.eos_token_ids,
                request.tenant,
            )
        except ValueError as problem:
            return InvalidRequestError(f"the grammar cannot be compiled: {problem}")
        except Exception:
            logger.exception("compiling a grammar failed")
            return EngineInternalError("the engine could not compile the grammar")
