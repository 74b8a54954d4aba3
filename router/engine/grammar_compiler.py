"""Grammars that are compiled while the requests that brought them wait.

Owns the thread that compiles, and which requests wait for it. Knows nothing of queues, of
steps or of what a grammar means.
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
    """Compiles one grammar at a time, first come first served, beside the loop.

    on_done: called on the loop with those answers of a request that are still there and a matcher
    at the grammar's start, of which each needs a copy, or with why there is none.
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
        """This answer needs no matcher any more; when all have left none is made for them."""
        job = self._jobs.pop(sequence, None)
        if job is not None:
            job.sequences.remove(sequence)
            if not job.sequences:
                job.task.cancel()

    def close(self) -> None:
        """Compile nothing any more; what is being compiled comes to nothing."""
        for job in self._jobs.values():
            job.task.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _run(self, request: AddRequest, sequences: list[Sequence]) -> None:
        result = await self._result(request)
        # Nothing is awaited from here on: nobody can leave in between.
        left = [one for one in sequences if self._jobs.pop(one, None) is not None]
        self._on_done(left, result)

    async def _result(self, request: AddRequest) -> TokenMatcher | EngineError:
        assert request.grammar is not None, "only a grammar is compiled"
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
            logger.exception("a grammar could not be compiled")
            return EngineInternalError("the engine could not compile the grammar")
